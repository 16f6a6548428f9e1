// What a SWITCH conditional node of a CUDA graph costs, and whether cuBLAS may be in its body.
//
//     nvcc -O3 -arch=sm_90 -rdc=true benchmarks/switch_nodes.cu -lcudadevrt -lcublas -o switch_nodes
//     ./switch_nodes
//
// Prints a line of JSON for each chain: nodes in a row, branches of each, microseconds of the whole
// graph (median of 200 launches between events). "plain" has the same kernels without the nodes;
// "empty" sets a value that no branch has. All handles are set by one kernel at the start.
#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#define HAS_CUBLAS 1
#endif
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                       \
    do {                                                                                  \
        cudaError_t error = (call);                                                       \
        if (error != cudaSuccess) {                                                       \
            printf("{\"error\": \"%s\", \"call\": \"%s\"}\n", cudaGetErrorName(error), #call); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

constexpr int kMost = 32;
struct Handles {
    cudaGraphConditionalHandle of[kMost];
};

__global__ void plan(Handles handles, int count, const unsigned *value) {
    if (threadIdx.x < count) cudaGraphSetConditional(handles.of[threadIdx.x], *value);
}

__global__ void work(int *counter, int weight) { atomicAdd(counter, weight); }

static cudaStream_t stream;
static int *counter;
static unsigned *value;

// Enqueues what a branch does: a small kernel, or products of a layer of width 384.
struct Body {
    bool products;
    int rows;
#ifdef HAS_CUBLAS
    cublasHandle_t blas;
#endif
    __half *a, *b, *c;
    void operator()(int branch) const {
        work<<<1, 1, 0, stream>>>(counter, branch + 1);
        if (!products) return;
#ifdef HAS_CUBLAS
        const __half one = __float2half(1.0f), zero = __float2half(0.0f);
        const int sizes[6][2] = {{384, 384}, {384, 384}, {384, 384}, {384, 384}, {1536, 384}, {384, 1536}};
        for (auto &[n, k] : sizes)
            cublasHgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, n, rows * (branch + 1), k, &one, a, n, b, k, &zero, c, n);
#endif
    }
};

static float median_us(cudaGraphExec_t exec) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 220; i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 20) times.push_back(ms * 1e3f);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// branches 0: without nodes, the kernels of branch `taken` one after the other.
static void chain(const Body &body, int nodes, int branches, unsigned taken) {
    cudaGraph_t graph;
    CHECK(cudaGraphCreate(&graph, 0));
    Handles handles{};
    for (int i = 0; i < nodes && branches; i++)
        CHECK(cudaGraphConditionalHandleCreate(&handles.of[i], graph, 0, 0));
    CHECK(cudaMemcpy(value, &taken, sizeof taken, cudaMemcpyHostToDevice));
    CHECK(cudaStreamBeginCaptureToGraph(stream, graph, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal));
    plan<<<1, kMost, 0, stream>>>(handles, branches ? nodes : 0, value);
    if (!branches)
        for (int i = 0; i < nodes; i++) body(taken);
    CHECK(cudaStreamEndCapture(stream, &graph));
    cudaGraphNode_t last;
    size_t count = 1;
    if (branches) CHECK(cudaGraphGetNodes(graph, &last, &count));
    for (int i = 0; i < nodes && branches; i++) {
        cudaGraphNodeParams params = {cudaGraphNodeTypeConditional};
        params.conditional.handle = handles.of[i];
        params.conditional.type = cudaGraphCondTypeSwitch;
        params.conditional.size = branches;
        cudaGraphNode_t node;
        CHECK(cudaGraphAddNode(&node, graph, &last, nullptr, 1, &params));
        for (int branch = 0; branch < branches; branch++) {
            cudaGraph_t inner = params.conditional.phGraph_out[branch];
            CHECK(cudaStreamBeginCaptureToGraph(stream, inner, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal));
            body(branch);
            CHECK(cudaStreamEndCapture(stream, nullptr));
        }
        last = node;
    }
    size_t before, after, total;
    CHECK(cudaMemGetInfo(&before, &total));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    cudaGraphExec_t exec;
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphUpload(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemGetInfo(&after, &total));
    CHECK(cudaMemset(counter, 0, sizeof(int)));
    float us = median_us(exec);
    int counted, expected = 0;
    CHECK(cudaMemcpy(&counted, counter, sizeof counted, cudaMemcpyDeviceToHost));
    if (!branches || taken < (unsigned)branches) expected = 220 * nodes * (taken + 1);
    printf("{\"products\": %s, \"nodes\": %d, \"branches\": %d, \"taken\": %u, \"us\": %.2f, \"memory_mb\": %.1f, \"right\": %s}\n",
           body.products ? "true" : "false", nodes, branches, taken, us, (before - after) / 1048576.0,
           counted == expected ? "true" : "false");
    fflush(stdout);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
}

int main() {
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaMalloc(&counter, sizeof(int)));
    CHECK(cudaMalloc(&value, sizeof(unsigned)));
    Body body{false, 64};
#ifdef HAS_CUBLAS
    cublasCreate(&body.blas);
    cublasSetStream(body.blas, stream);
    void *workspace;
    CHECK(cudaMalloc(&workspace, 32 << 20));
    cublasSetWorkspace(body.blas, workspace, 32 << 20);
    for (__half **array : {&body.a, &body.b, &body.c}) CHECK(cudaMalloc(array, 16 << 20));
#endif
    for (bool products : {false, true}) {
        body.products = products;
        body(7);
        CHECK(cudaStreamSynchronize(stream));
        for (int nodes : {1, 6, 12, 24}) {
            chain(body, nodes, 0, 3);
            for (int branches : {4, 8, 16}) {
                chain(body, nodes, branches, 3);
                if (branches == 8) chain(body, nodes, branches, 99);
            }
        }
    }
    return 0;
}
