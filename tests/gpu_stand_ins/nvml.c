/* A stand-in for libnvidia-ml.so.1 with one GPU, whose figures are the lines of the file NVML_STAND_IN:
   used and total bytes, utilization in percent, temperature. A figure of -1 is not supported. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
struct memory { unsigned long long total, free, used; };
struct utilization { unsigned gpu, memory; };

static int read_figures(long long figures[4]) {
    FILE *file = fopen(getenv("NVML_STAND_IN"), "r");
    if (!file) return GPU_IS_LOST;
    int found = fscanf(file, "%lld %lld %lld %lld", figures, figures + 1, figures + 2, figures + 3);
    fclose(file);
    return found == 4 ? OK : GPU_IS_LOST;
}

int nvmlInitWithFlags(unsigned flags) {
    long long figures[4];
    return read_figures(figures) ? DRIVER_NOT_LOADED : OK;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int error) { return error == GPU_IS_LOST ? "GPU is lost" : "stand-in"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &read_figures;
    return strcmp(uuid, "GPU-1") ? NOT_FOUND : OK;
}
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    long long figures[4];
    int error = read_figures(figures);
    if (error) return error;
    memory->used = figures[0], memory->total = figures[1], memory->free = figures[1] - figures[0];
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, struct utilization *utilization) {
    long long figures[4];
    int error = read_figures(figures);
    if (error) return error;
    utilization->gpu = figures[2];
    return figures[2] < 0 ? NOT_SUPPORTED : OK;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *temperature) {
    long long figures[4];
    int error = read_figures(figures);
    if (error) return error;
    *temperature = figures[3];
    return figures[3] < 0 ? NOT_SUPPORTED : OK;
}
