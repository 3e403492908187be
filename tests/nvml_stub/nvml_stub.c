/* A libnvidia-ml.so.1 that does what a script says.
 *
 * The script is the file named by NVML_STUB_SCRIPT, read anew at each call: lines of `name value`.
 *   FUNCTION code      the function returns this NVML code instead of doing its work
 *   hang FUNCTION      calls of the function do not return while the line is there
 *   count N            GPUs (default 1)
 *   lost I             GPU I answers "GPU is lost" to everything
 *   xid N              one event with this XID for GPU 0; delivered once for each new N
 * Compiled with -DOLD it lacks nvmlDeviceGetPowerUsage, as an old driver lacks newer functions.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int index; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { Device *device; unsigned long long type, data; unsigned int gi, ci; } Event;

enum { OK = 0, INVALID = 2, TIMEOUT = 10, LOST = 15 };
static Device devices[8] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
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
    snprintf(name, length, "Stub GPU");
    return OK;
}

int nvmlDeviceGetUUID(Device *d, char *uuid, unsigned int length) {
    ENTER(d);
    snprintf(uuid, length, "GPU-%d", d->index);
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *d, Memory *memory) {
    ENTER(d);
    memory->total = 80ULL << 30;
    memory->used = 60ULL << 30;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(Device *d, Utilization *rates) {
    ENTER(d);
    rates->gpu = 93;
    rates->memory = 40;
    return OK;
}

#ifndef OLD
int nvmlDeviceGetPowerUsage(Device *d, unsigned int *milliwatts) { ENTER(d); *milliwatts = 640500; return OK; }
#endif

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
    static long delivered;
    (void)set;
    ENTER(NULL);
    for (unsigned int waited = 0; waited < milliseconds; waited += 5) {
        long xid = script("xid", NULL, 0);
        if (xid && xid != delivered) {
            delivered = xid;
            *event = (Event){&devices[0], 8, (unsigned long long)xid, 0, 0};
            return OK;
        }
        usleep(5000);
    }
    return TIMEOUT;
}
