/* What must be answered of cuBLAS: handles and words. Products are generated, and do nothing. */
#include <stdlib.h>

enum { HANDLE = 512 };

static int handle(void **where) { return (*where = calloc(1, HANDLE)) == NULL; }

int cublasCreate_v2(void **context) { return handle(context); }
const char *cublasGetStatusName(int status) { return (void)status, "stub"; }
const char *cublasGetStatusString(int status) { return (void)status, "a stub without a device"; }
