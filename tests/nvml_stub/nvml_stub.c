/* A libnvidia-ml.so.1 that follows a script.
 *
 * The script is the file named by NVML_STUB_SCRIPT, read again at each call: lines of `name value`.
 *   FUNCTION code      the function returns this NVML code instead of doing its work
 *   hang FUNCTION      calls of the function do not return while the line is there
 *   count N            GPUs (default 1)
 *   lost I             GPU I answers "GPU is lost" to everything
 *   field CODE         each field of a batch has this code of its own
 *   mig N              GPU 0 is sliced, and slice N alone can be seen from here
 *   free N             MiB of free memory
 *   processes N        processes that compute on each GPU (default 2); each request for a list is reported on stderr
 *   power N            milliwatts of the batch (default 640500); utilization N: percent (default 93)
 *   gpm N              1: the GPU has GPM; then tensor and dram N: percent, nvlink N: MiB a second each way (default 0)
 *   recovery N, ecc N, remap_pending N, remap_failed N    those fields of a batch, which it lacks otherwise
 *   operational N      there are GPU Operational Events, one of severity N for each new N above 1
 *   xid N              one event with this XID for GPU 0; delivered once for each new N
 * Compiled with -DOLD it lacks nvmlDeviceGetFieldValues, nvmlDeviceGetTotalEnergyConsumption, GPM and GPU Operational Events, as an
 * old driver does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int index; int slice; } Device; /* slice: -1 for a whole GPU */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { Device *device; unsigned long long type, data; unsigned int gi, ci; } Event;

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMEOUT = 10, LOST = 15 };
typedef struct {
    unsigned int id, scope;
    long long timestamp, latency;
    unsigned int type, code;
    union { double dVal; unsigned int uiVal; unsigned long long ullVal; } value;
} Field;
typedef struct { unsigned int pid; unsigned long long memory; unsigned int gi, ci; } Process;
static Device devices[8] = {{0, -1}, {1, -1}, {2, -1}, {3, -1}, {4, -1}, {5, -1}, {6, -1}, {7, -1}};
static Device slices[8] = {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}, {0, 5}, {0, 6}, {0, 7}};
static int events;

/* The number after `name`, or `otherwise`; where `word` is given, whether a line `name word` is there. */
static long script(const char *name, const char *word, long otherwise) {
    char key[64], value[64];
    const char *path = getenv("NVML_STUB_SCRIPT");
    FILE *file = path ? fopen(path, "r") : NULL;
    long found = otherwise;
    while (file && fscanf(file, "%63s %63s", key, value) == 2)
        if (!strcmp(key, name) && (!word || !strcmp(value, word))) found = word ? 1 : atol(value);
    if (file) fclose(file);
    return found;
}

static int enter(const char *function, Device *device) {
    while (script("hang", function, 0)) usleep(5000);
    if (device && script("lost", NULL, -1) == device->index) return LOST;
    return (int)script(function, NULL, OK);
}

#define ENTER(device) do { int code = enter(__func__, device); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned int flags) { (void)flags; ENTER(NULL); return OK; }
int nvmlShutdown(void) { ENTER(NULL); return OK; }
const char *nvmlErrorString(int code) { (void)code; return "scripted"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { ENTER(NULL); *count = (unsigned)script("count", NULL, 1); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if (index >= 8) return INVALID;
    ENTER(&devices[index]);
    *device = &devices[index];
    return OK;
}

int nvmlDeviceGetName(Device *d, char *name, unsigned int length) {
    ENTER(d);
    snprintf(name, length, d->slice < 0 ? "Stub GPU" : "Stub GPU MIG 1g.10gb");
    return OK;
}

int nvmlDeviceGetUUID(Device *d, char *uuid, unsigned int length) {
    ENTER(d);
    if (d->slice < 0) snprintf(uuid, length, "GPU-%d", d->index);
    else snprintf(uuid, length, "MIG-%d-%d", d->index, d->slice);
    return OK;
}

/* A device of CUDA has the UUID of the NVML device with its number; a slice has that of MIG. */
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    ENTER(NULL);
    unsigned first;
    int mig = script("mig", NULL, -1) >= 0;
    if (sscanf(uuid, mig ? "MIG-%2x" : "GPU-%2x", &first) != 1 || first % 16 || first / 16 >= 8) return NOT_FOUND;
    *device = mig ? &slices[script("mig", NULL, -1)] : &devices[first / 16];
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *d, Memory *memory) {
    ENTER(d);
    memory->total = (d->slice < 0 ? 80ULL : 10ULL) << 30;
    memory->used = (d->slice < 0 ? 60ULL : 7ULL) << 30;
    if (script("free", NULL, -1) >= 0) memory->used = memory->total - ((unsigned long long)script("free", NULL, 0) << 20);
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(Device *d, Utilization *rates) {
    ENTER(d);
    rates->gpu = (unsigned)script("utilization", NULL, 93);
    rates->memory = 40;
    return OK;
}

int nvmlDeviceGetPowerUsage(Device *d, unsigned int *milliwatts) { ENTER(d); *milliwatts = 640000; return OK; }
#ifndef OLD
int nvmlDeviceGetTotalEnergyConsumption(Device *d, unsigned long long *millijoules) { ENTER(d); *millijoules = 7000; return OK; }

/* Average power in milliwatts, energy in millijoules: other figures than the single calls give, to distinguish the two. */
int nvmlDeviceGetFieldValues(Device *d, int count, Field *fields) {
    ENTER(d);
    for (int i = 0; i < count; i++) {
        fields[i].code = (unsigned int)script("field", NULL, OK);
        fields[i].type = fields[i].id == 83 || fields[i].id == 4 ? 3 : 1;
        const char *name = fields[i].id == 230 ? "recovery" : fields[i].id == 4 ? "ecc" :
            fields[i].id == 144 ? "remap_pending" : fields[i].id == 145 ? "remap_failed" : NULL;
        if (fields[i].id == 185) fields[i].value.uiVal = (unsigned)script("power", NULL, 640500);
        else if (fields[i].id == 83) fields[i].value.ullVal = 5000000500ULL;
        else if (!name) fields[i].code = INVALID;
        else if (script(name, NULL, -1) < 0) fields[i].code = NOT_SUPPORTED;
        else if (fields[i].type == 3) fields[i].value.ullVal = (unsigned long long)script(name, NULL, 0);
        else fields[i].value.uiVal = (unsigned)script(name, NULL, 0);
    }
    return OK;
}

/* GPM: a sample knows its number, so that two equal ones are distinguished from two in order. */
typedef struct { unsigned version, supported; } Support;
typedef struct { int number; } Sample;
typedef struct { unsigned id; int code; double value; const char *names[3]; } Metric;
typedef struct { unsigned version, count; Sample *first, *second; Metric metrics[]; } Metrics;
static int sampled;

int nvmlGpmQueryDeviceSupport(Device *d, Support *support) {
    ENTER(d);
    support->supported = (unsigned)script("gpm", NULL, 0);
    return OK;
}

int nvmlGpmSampleAlloc(Sample **sample) { ENTER(NULL); return (*sample = calloc(1, sizeof **sample)) ? OK : SMALL; }
int nvmlGpmSampleFree(Sample *sample) { free(sample); return OK; }
int nvmlGpmSampleGet(Device *d, Sample *sample) { ENTER(d); sample->number = ++sampled; return d->slice < 0 ? OK : INVALID; }

int nvmlGpmMigSampleGet(Device *d, unsigned instance, Sample *sample) {
    ENTER(d);
    sample->number = ++sampled;
    return d->slice < 0 && instance == 7 ? OK : INVALID;
}

int nvmlDeviceGetGpuInstanceId(Device *d, unsigned *instance) { ENTER(d); *instance = 7; return d->slice < 0 ? INVALID : OK; }

int nvmlGpmMetricsGet(Metrics *wanted) {
    ENTER(NULL);
    if (wanted->version != 1 || !wanted->first || wanted->second->number <= wanted->first->number) return INVALID;
    for (unsigned i = 0; i < wanted->count; i++) {
        Metric *one = &wanted->metrics[i];
        const char *name = one->id == 5 ? "tensor" : one->id == 10 ? "dram" : "nvlink";
        one->code = script("no", name, 0) ? NOT_SUPPORTED : OK;
        one->value = (double)script(name, NULL, 0);
    }
    return OK;
}

typedef struct { char uuid[96]; unsigned level, severity; } Wanted;
typedef struct {
    unsigned timeout, kind;
    char uuid[96], module[16];
    unsigned long long type, data, cursor, instance, timestamp, trace;
    unsigned gi, ci, severity, category, code, scope, originator, module_instance, chiplet, level, attributes, size, group;
    unsigned char group_size, group_index;
} AnyEvent;

int nvmlEventSetRegisterGpuOperationalEvents_v1(int *set, Wanted *wanted) {
    (void)set;
    ENTER(NULL);
    if (!script("operational", NULL, 0)) return NOT_SUPPORTED;
    return strncmp(wanted->uuid, "GPU-", 4) || wanted->severity != 30 ? INVALID : OK;
}
#endif
static int next_event(unsigned int milliseconds, long *xid, long *severity) {
    static long delivered, reported;
    for (unsigned int waited = 0; waited <= milliseconds; waited += 5) {
        *xid = script("xid", NULL, 0), *severity = script("operational", NULL, 0);
        if (*xid && *xid != delivered) return delivered = *xid, *severity = 0, 1;
        if (*severity > 1 && *severity != reported) return reported = *severity, *xid = 0, 1;
        usleep(5000);
    }
    return 0;
}

#ifndef OLD
int nvmlEventSetWait_v3(int *set, AnyEvent *event) {
    long xid, severity;
    (void)set;
    ENTER(NULL);
    if (!next_event(event->timeout, &xid, &severity)) return TIMEOUT;
    event->kind = xid ? 0 : 1;
    snprintf(event->uuid, sizeof event->uuid, "GPU-0");
    event->type = xid ? 8 : 0;
    event->data = (unsigned long long)xid;
    event->severity = (unsigned)severity;
    event->code = 77;
    return OK;
}
#endif

int nvmlDeviceGetClockInfo(Device *d, unsigned int type, unsigned int *megahertz) {
    ENTER(d);
    if (type != 1) return INVALID;
    *megahertz = 1980;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *reasons) {
    ENTER(d);
    *reasons = 0x4 | 0x1 | 0x40;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned int *count, Process *list) {
    unsigned int there = (unsigned int)script("processes", NULL, 2);
    ENTER(d);
    if (!list) fprintf(stderr, "process list\n");
    if (there > *count || !list) return *count = there, there ? SMALL : OK;
    for (unsigned int i = 0; i < there; i++) list[i] = (Process){100 + i, 1 << 30, 0, 0};
    *count = there;
    return OK;
}

int nvmlDeviceGetMigMode(Device *d, unsigned int *now, unsigned int *pending) {
    ENTER(d);
    if (d->slice >= 0) return INVALID;
    *now = *pending = d->index == 0 && script("mig", NULL, -1) >= 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned int *count) { ENTER(d); *count = 7; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned int index, Device **slice) {
    ENTER(d);
    if (script("mig", NULL, -1) != (long)index) return NOT_FOUND;
    *slice = &slices[index];
    return OK;
}

int nvmlDeviceGetTemperature(Device *d, unsigned int sensor, unsigned int *celsius) {
    (void)sensor;
    ENTER(d);
    *celsius = 61;
    return OK;
}

int nvmlEventSetCreate(int **set) { ENTER(NULL); *set = &events; return OK; }
int nvmlEventSetFree(int *set) { (void)set; ENTER(NULL); return OK; }
int nvmlDeviceRegisterEvents(Device *d, unsigned long long types, int *set) { (void)types; (void)set; ENTER(d); return OK; }

int nvmlEventSetWait_v2(int *set, Event *event, unsigned int milliseconds) {
    long xid, severity;
    (void)set;
    ENTER(NULL);
    if (!next_event(milliseconds, &xid, &severity) || !xid) return TIMEOUT;
    *event = (Event){&devices[0], 8, (unsigned long long)xid, 0, 0};
    return OK;
}
