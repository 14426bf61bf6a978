/* What must be answered of cuBLASLt: handles. */
#include <stdlib.h>

enum { HANDLE = 512 };

static int handle(void **where) { return (*where = calloc(1, HANDLE)) == NULL; }

int cublasLtCreate(void **context) { return handle(context); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return (void)compute, (void)scale, handle(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatrixLayoutCreate(void **made) { return handle(made); }
int cublasLtMatrixTransformDescCreate(void **made) { return handle(made); }
