/* What must be answered of cuDNN: its version, handles and words. Everything that computes is generated. */
#include <stdint.h>
#include <stdlib.h>

enum { HANDLE = 512, VERSION = 91900 };

static int handle(void **where) { return (*where = calloc(1, HANDLE)) == NULL; }

size_t cudnnGetVersion(void) { return VERSION; }
const char *cudnnGetErrorString(int status) { return (void)status, "a stub without a device"; }
void cudnnGetLastErrorString(char *message, size_t bytes) {
    if (bytes) *message = 0;
}

int cudnnCreate(void **context) { return handle(context); }
int cudnnBackendCreateDescriptor(int type, void **made) { return (void)type, handle(made); }
int cudnnCreateActivationDescriptor(void **made) { return handle(made); }
int cudnnCreateConvolutionDescriptor(void **made) { return handle(made); }
int cudnnCreateDropoutDescriptor(void **made) { return handle(made); }
int cudnnCreateFilterDescriptor(void **made) { return handle(made); }
int cudnnCreateLRNDescriptor(void **made) { return handle(made); }
int cudnnCreatePoolingDescriptor(void **made) { return handle(made); }
int cudnnCreateReduceTensorDescriptor(void **made) { return handle(made); }
int cudnnCreateRNNDataDescriptor(void **made) { return handle(made); }
int cudnnCreateRNNDescriptor(void **made) { return handle(made); }
int cudnnCreateTensorDescriptor(void **made) { return handle(made); }

/* Sizes and shapes, all of them none: what the provider would reserve or copy is nothing. */

int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *count, void *values) {
    return (void)descriptor, (void)name, (void)type, (void)wanted, (void)values, *count = 0, 0;
}
int cudnnDropoutGetStatesSize(void *context, size_t *bytes) { return (void)context, *bytes = 0; }
int cudnnGetConvolutionForwardWorkspaceSize(
    void *context, void *from, void *filter, void *convolution, void *to, int algorithm, size_t *bytes) {
    return (void)context, (void)from, (void)filter, (void)convolution, (void)to, (void)algorithm, *bytes = 0;
}
int cudnnGetReductionIndicesSize(void *context, void *reduction, void *from, void *to, size_t *bytes) {
    return (void)context, (void)reduction, (void)from, (void)to, *bytes = 0;
}
int cudnnGetReductionWorkspaceSize(void *context, void *reduction, void *from, void *to, size_t *bytes) {
    return (void)context, (void)reduction, (void)from, (void)to, *bytes = 0;
}
int cudnnGetRNNTempSpaceSizes(
    void *context, void *network, int mode, void *from, size_t *workspace, size_t *reserved) {
    return (void)context, (void)network, (void)mode, (void)from, *workspace = *reserved = 0;
}
int cudnnGetRNNWeightParams(
    void *context, void *network, int32_t layer, size_t bytes, void *weights, int32_t part, void *matrix,
    void **matrix_at, void *bias, void **bias_at) {
    (void)context, (void)network, (void)layer, (void)bytes, (void)part, (void)matrix, (void)bias;
    if (matrix_at) *matrix_at = weights;
    if (bias_at) *bias_at = weights;
    return 0;
}
int cudnnGetTensorNdDescriptor(void *descriptor, int wanted, int *type, int *rank, int *shape, int *strides) {
    (void)descriptor;
    *type = 0;
    *rank = wanted;
    for (int axis = 0; axis < wanted; axis++) shape[axis] = strides[axis] = 0;
    return 0;
}
