/* A libnvidia-ml.so.1 whose card is scripted by a text file, for tests on machines without a GPU.
 *
 * The file named by NVML_STUB_STATE holds key=value lines and is read again at each call, so a
 * test can change the card while the process under test runs. A key that is missing makes the
 * functions that need it answer NVML_ERROR_NOT_SUPPORTED, as a GPU without that sensor does.
 * For a machine with several GPUs "key_1" is GPU 1's value, where "key" is everyone's.
 * The keys and their units are listed in tests/nvml_stub.py, which also builds this file.
 *
 * Struct layouts and function names are those that nvidia-ml-py's ctypes declare.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25,
};

enum { MAX_GPUS = 8, MAX_MIG_DEVICES = 7, TEXT_SIZE = 4096, WHOLE_GPU = -1 };

/* What a device handle points to. */
typedef struct {
    int gpu;
    int mig_position; /* WHOLE_GPU for a card */
} device_t;

typedef struct {
    char uuid[96];
    unsigned gpu_instance_id;
    unsigned multiprocessor_count;
    unsigned memory_mib;
    unsigned used_mib;
    char profile[32];
} mig_t;

typedef struct {
    int filled;
    int gpu;
    int gpu_instance_id; /* WHOLE_GPU for a card */
    double seconds;
} gpm_sample_t;

static device_t cards[MAX_GPUS];
static device_t instances[MAX_GPUS][MAX_MIG_DEVICES];
static int initialized = 0;

/* --- the scripted state --- */

static int read_key(const char *key, char *text)
{
    const char *path = getenv("NVML_STUB_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    static char line[TEXT_SIZE];
    size_t length = strlen(key);
    int found = 0;
    if (!file)
        return 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) == 0 && line[length] == '=') {
            line[strcspn(line, "\n")] = '\0';
            strcpy(text, line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static int read_text(const char *key, int gpu, char *text)
{
    char own_key[128];
    snprintf(own_key, sizeof own_key, "%s_%d", key, gpu);
    return read_key(own_key, text) || read_key(key, text);
}

static int read_number(const char *key, int gpu, double *number)
{
    char text[TEXT_SIZE];
    char *end;
    if (!read_text(key, gpu, text))
        return 0;
    *number = strtod(text, &end);
    return end != text;
}

static int read_unsigned(const char *key, int gpu, unsigned *number)
{
    double value;
    if (!read_number(key, gpu, &value))
        return 0;
    *number = (unsigned)value;
    return 1;
}

static double monotonic_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

/* The code that "fail=function:code,function:code" sets for this function, else SUCCESS. */
static int scripted_failure(const char *function)
{
    char text[TEXT_SIZE];
    if (!read_key("fail", text))
        return SUCCESS;
    for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
        char *colon = strchr(item, ':');
        if (colon && (size_t)(colon - item) == strlen(function) &&
            strncmp(item, function, colon - item) == 0)
            return atoi(colon + 1);
    }
    return SUCCESS;
}

/* First line of every function: uninitialized and scripted failures. */
#define ENTER()                                      \
    do {                                             \
        int failure = scripted_failure(__func__);    \
        if (failure)                                 \
            return failure;                          \
        if (!initialized)                            \
            return UNINITIALIZED;                    \
    } while (0)

static int gpu_count(void)
{
    unsigned count = 0;
    read_unsigned("count", 0, &count);
    return count > MAX_GPUS ? MAX_GPUS : (int)count;
}

static int mig_enabled(int gpu)
{
    unsigned mode = 0;
    return read_unsigned("mig_mode_current", gpu, &mode) && mode == 1;
}

/* The instance at a position of "mig_devices"; positions can be holes, written "-". */
static int read_mig(int gpu, int position, mig_t *mig)
{
    char text[TEXT_SIZE];
    char *rest = text;
    char *item;
    mig->profile[0] = '\0'; /* may be left out */
    if (!mig_enabled(gpu) || !read_text("mig_devices", gpu, text))
        return 0;
    for (int i = 0; (item = strsep(&rest, ";")) != NULL; i++)
        if (i == position)
            return sscanf(item, "%95[^:]:%u:%u:%u:%u:%31s", mig->uuid, &mig->gpu_instance_id,
                          &mig->multiprocessor_count, &mig->memory_mib, &mig->used_mib,
                          mig->profile) >= 5;
    return 0;
}

static int device_uuid(const device_t *device, char *uuid)
{
    mig_t mig;
    if (device->mig_position == WHOLE_GPU)
        return read_text("uuid", device->gpu, uuid);
    if (!read_mig(device->gpu, device->mig_position, &mig))
        return 0;
    strcpy(uuid, mig.uuid);
    return 1;
}

static int copy_text(char *target, unsigned size, const char *text)
{
    if (strlen(text) + 1 > size)
        return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

/* Answers of the form "one unsigned of the card"; instances have no sensors of their own. */
static int sensor(const device_t *device, const char *key, double factor, unsigned *value)
{
    double number;
    if (device->mig_position != WHOLE_GPU || !read_number(key, device->gpu, &number))
        return NOT_SUPPORTED;
    *value = (unsigned)llround(number * factor);
    return SUCCESS;
}

/* --- library and system --- */

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int failure = scripted_failure(__func__);
    if (failure)
        return failure;
    for (int gpu = 0; gpu < MAX_GPUS; gpu++) {
        cards[gpu] = (device_t){gpu, WHOLE_GPU};
        for (int position = 0; position < MAX_MIG_DEVICES; position++)
            instances[gpu][position] = (device_t){gpu, position};
    }
    initialized = 1;
    return SUCCESS;
}

int nvmlShutdown(void)
{
    ENTER();
    initialized = 0;
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    char text[TEXT_SIZE];
    ENTER();
    return read_key("driver_version", text) ? copy_text(version, size, text) : NOT_SUPPORTED;
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    unsigned number;
    ENTER();
    if (!read_unsigned("cuda_driver_version", 0, &number))
        return NOT_SUPPORTED;
    *version = (int)number;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    ENTER();
    return nvmlSystemGetCudaDriverVersion(version);
}

/* --- devices --- */

int nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER();
    *count = (unsigned)gpu_count();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **device)
{
    unsigned lost;
    ENTER();
    if (index >= (unsigned)gpu_count())
        return INVALID_ARGUMENT;
    if (read_unsigned("lost", index, &lost) && lost)
        return GPU_IS_LOST;
    *device = &cards[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device)
{
    char text[TEXT_SIZE];
    ENTER();
    for (int gpu = 0; gpu < gpu_count(); gpu++) {
        for (int position = WHOLE_GPU; position < MAX_MIG_DEVICES; position++) {
            device_t *candidate = position < 0 ? &cards[gpu] : &instances[gpu][position];
            if (device_uuid(candidate, text) && strcmp(text, uuid) == 0) {
                *device = candidate;
                return SUCCESS;
            }
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(device_t *device, unsigned *index)
{
    ENTER();
    if (device->mig_position != WHOLE_GPU)
        return NOT_SUPPORTED;
    *index = (unsigned)device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetUUID(device_t *device, char *uuid, unsigned size)
{
    char text[TEXT_SIZE];
    ENTER();
    return device_uuid(device, text) ? copy_text(uuid, size, text) : NOT_SUPPORTED;
}

int nvmlDeviceGetName(device_t *device, char *name, unsigned size)
{
    char text[TEXT_SIZE];
    mig_t mig;
    ENTER();
    if (!read_text("name", device->gpu, text))
        return NOT_SUPPORTED;
    if (device->mig_position != WHOLE_GPU && read_mig(device->gpu, device->mig_position, &mig) &&
        mig.profile[0]) {
        strcat(text, " MIG ");
        strcat(text, mig.profile);
    }
    return copy_text(name, size, text);
}

int nvmlDeviceGetComputeMode(device_t *device, unsigned *mode)
{
    ENTER();
    return sensor(device, "compute_mode", 1, mode);
}

int nvmlDeviceGetCudaComputeCapability(device_t *device, int *major, int *minor)
{
    char text[TEXT_SIZE];
    ENTER();
    if (!read_text("compute_capability", device->gpu, text))
        return NOT_SUPPORTED;
    return sscanf(text, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

/* --- memory and sensors --- */

typedef struct {
    unsigned long long total, free, used;
} memory_t;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_v2_t;

static int read_memory(const device_t *device, memory_v2_t *memory)
{
    double total, used, reserved = 0;
    mig_t mig;
    if (device->mig_position != WHOLE_GPU) {
        if (!read_mig(device->gpu, device->mig_position, &mig))
            return NOT_SUPPORTED;
        total = mig.memory_mib;
        used = mig.used_mib;
    } else if (!read_number("memory_total_mib", device->gpu, &total) ||
               !read_number("memory_used_mib", device->gpu, &used)) {
        return NOT_SUPPORTED;
    } else {
        read_number("memory_reserved_mib", device->gpu, &reserved);
    }
    memory->total = (unsigned long long)(total * 1048576);
    memory->used = (unsigned long long)(used * 1048576);
    memory->reserved = (unsigned long long)(reserved * 1048576);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory)
{
    memory_v2_t whole;
    int code;
    ENTER();
    code = read_memory(device, &whole);
    if (code == SUCCESS) /* version 1 counts what the driver reserves as used */
        *memory = (memory_t){whole.total, whole.free, whole.used + whole.reserved};
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *memory)
{
    ENTER();
    if (memory->version != 0x02000028)
        return ARGUMENT_VERSION_MISMATCH;
    return read_memory(device, memory);
}

typedef struct {
    unsigned gpu, memory;
} utilization_t;

int nvmlDeviceGetUtilizationRates(device_t *device, utilization_t *utilization)
{
    ENTER();
    if (mig_enabled(device->gpu))
        return NOT_SUPPORTED;
    utilization->memory = 0;
    return sensor(device, "utilization_gpu_percent", 1, &utilization->gpu);
}

int nvmlDeviceGetClockInfo(device_t *device, unsigned type, unsigned *mhz)
{
    ENTER();
    return type == 1 ? sensor(device, "sm_clock_mhz", 1, mhz) : NOT_SUPPORTED;
}

int nvmlDeviceGetPowerUsage(device_t *device, unsigned *milliwatts)
{
    ENTER();
    return sensor(device, "power_draw_watts", 1000, milliwatts);
}

/* "energy_joules" is the counter; "energy_joules=clock" makes it the integral of the power. */
int nvmlDeviceGetTotalEnergyConsumption(device_t *device, unsigned long long *millijoules)
{
    char text[TEXT_SIZE];
    double number;
    ENTER();
    if (device->mig_position != WHOLE_GPU || !read_text("energy_joules", device->gpu, text))
        return NOT_SUPPORTED;
    if (strcmp(text, "clock") == 0) {
        if (!read_number("power_draw_watts", device->gpu, &number))
            return NOT_SUPPORTED;
        number *= monotonic_seconds();
    } else {
        number = strtod(text, NULL);
    }
    *millijoules = (unsigned long long)llround(number * 1000);
    return SUCCESS;
}

typedef struct {
    unsigned version;
    unsigned sensor_type;
    int temperature;
} temperature_t;

int nvmlDeviceGetTemperatureV(device_t *device, temperature_t *temperature)
{
    unsigned celsius;
    int code;
    ENTER();
    if (temperature->version != 0x100000C)
        return ARGUMENT_VERSION_MISMATCH;
    code = sensor(device, "temperature_celsius", 1, &celsius);
    if (code == SUCCESS)
        temperature->temperature = (int)celsius;
    return code;
}

int nvmlDeviceGetTemperature(device_t *device, unsigned sensor_type, unsigned *celsius)
{
    (void)sensor_type;
    ENTER();
    return sensor(device, "temperature_celsius", 1, celsius);
}

static int clocks_event_reasons(const device_t *device, unsigned long long *reasons)
{
    char text[TEXT_SIZE];
    if (device->mig_position != WHOLE_GPU ||
        !read_text("clocks_event_reasons", device->gpu, text))
        return NOT_SUPPORTED;
    *reasons = strtoull(text, NULL, 0);
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t *device, unsigned long long *reasons)
{
    ENTER();
    return clocks_event_reasons(device, reasons);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device_t *device, unsigned long long *reasons)
{
    ENTER();
    return clocks_event_reasons(device, reasons);
}

/* --- processes --- */

typedef struct {
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance_id, compute_instance_id;
} process_t;

/* "pid:mib,pid:mib:gpu_instance_id,..."; "-" for memory that the driver does not tell. */
static int list_processes(const device_t *device, const char *key, unsigned *count, process_t *list)
{
    char text[TEXT_SIZE];
    unsigned found = 0;
    mig_t mig;
    if (!read_text(key, device->gpu, text))
        return NOT_SUPPORTED;
    if (device->mig_position != WHOLE_GPU && !read_mig(device->gpu, device->mig_position, &mig))
        return NOT_SUPPORTED;
    for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
        process_t process = {0, 0, 0xFFFFFFFF, 0xFFFFFFFF};
        char memory[32] = "-";
        if (sscanf(item, "%u:%31[^:]:%u", &process.pid, memory, &process.gpu_instance_id) < 1)
            continue;
        process.used_bytes = strcmp(memory, "-") == 0
                                 ? ~0ULL
                                 : (unsigned long long)(strtod(memory, NULL) * 1048576);
        if (device->mig_position != WHOLE_GPU && process.gpu_instance_id != mig.gpu_instance_id)
            continue;
        if (list && found < *count)
            list[found] = process;
        found++;
    }
    if (found > *count) {
        *count = found;
        return INSUFFICIENT_SIZE;
    }
    *count = found;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(device_t *device, unsigned *count, process_t *list)
{
    ENTER();
    return list_processes(device, "pids", count, list);
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t *device, unsigned *count, process_t *list)
{
    ENTER();
    return list_processes(device, "pids", count, list);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v2(device_t *device, unsigned *count, process_t *list)
{
    ENTER();
    return list_processes(device, "mps_pids", count, list);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(device_t *device, unsigned *count, process_t *list)
{
    ENTER();
    return list_processes(device, "mps_pids", count, list);
}

/* --- MIG --- */

typedef struct {
    unsigned multiprocessor_count, shared_copy_engines, shared_decoders, shared_encoders;
    unsigned shared_jpeg, shared_ofa, gpu_instance_slices, compute_instance_slices;
    unsigned long long memory_mib;
} attributes_t;

int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending)
{
    ENTER();
    if (sensor(device, "mig_mode_current", 1, current) != SUCCESS)
        return NOT_SUPPORTED;
    *pending = *current;
    read_unsigned("mig_mode_pending", device->gpu, pending);
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(device_t *device, unsigned *is_mig)
{
    ENTER();
    *is_mig = device->mig_position != WHOLE_GPU;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned *count)
{
    ENTER();
    *count = mig_enabled(device->gpu) ? MAX_MIG_DEVICES : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device_t *device, unsigned index, device_t **mig_device)
{
    mig_t mig;
    ENTER();
    if (index >= MAX_MIG_DEVICES)
        return INVALID_ARGUMENT;
    if (!read_mig(device->gpu, (int)index, &mig))
        return NOT_FOUND;
    *mig_device = &instances[device->gpu][index];
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t *mig_device, device_t **device)
{
    ENTER();
    if (mig_device->mig_position == WHOLE_GPU)
        return INVALID_ARGUMENT;
    *device = &cards[mig_device->gpu];
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(device_t *device, unsigned *id)
{
    mig_t mig;
    ENTER();
    if (device->mig_position == WHOLE_GPU || !read_mig(device->gpu, device->mig_position, &mig))
        return NOT_FOUND;
    *id = mig.gpu_instance_id;
    return SUCCESS;
}

int nvmlDeviceGetAttributes_v2(device_t *device, attributes_t *attributes)
{
    mig_t mig;
    ENTER();
    if (device->mig_position == WHOLE_GPU || !read_mig(device->gpu, device->mig_position, &mig))
        return INVALID_ARGUMENT;
    *attributes = (attributes_t){.multiprocessor_count = mig.multiprocessor_count,
                                 .memory_mib = mig.memory_mib};
    return SUCCESS;
}

/* --- GPM --- */

typedef struct {
    unsigned version, is_supported;
} gpm_support_t;

typedef struct {
    unsigned id;
    unsigned code;
    double value;
    const char *short_name, *long_name, *unit;
} gpm_metric_t;

typedef struct {
    unsigned version, metric_count;
    gpm_sample_t *earlier, *later;
    gpm_metric_t metrics[]; /* the declared length grows with each driver; only the count is used */
} gpm_request_t;

int nvmlGpmQueryDeviceSupport(device_t *device, gpm_support_t *support)
{
    unsigned supported = 0;
    ENTER();
    if (support->version != 1)
        return ARGUMENT_VERSION_MISMATCH;
    read_unsigned("gpm", device->gpu, &supported);
    support->is_supported = supported;
    return SUCCESS;
}

int nvmlGpmSampleAlloc(gpm_sample_t **sample)
{
    ENTER();
    *sample = calloc(1, sizeof **sample);
    return SUCCESS;
}

int nvmlGpmSampleFree(gpm_sample_t *sample)
{
    ENTER();
    free(sample);
    return SUCCESS;
}

int nvmlGpmSampleGet(device_t *device, gpm_sample_t *sample)
{
    unsigned supported = 0;
    ENTER();
    if (device->mig_position != WHOLE_GPU || mig_enabled(device->gpu) ||
        !read_unsigned("gpm", device->gpu, &supported) || !supported)
        return NOT_SUPPORTED;
    *sample = (gpm_sample_t){1, device->gpu, WHOLE_GPU, monotonic_seconds()};
    return SUCCESS;
}

int nvmlGpmMigSampleGet(device_t *device, unsigned gpu_instance_id, gpm_sample_t *sample)
{
    unsigned supported = 0;
    mig_t mig;
    ENTER();
    if (!read_unsigned("gpm", device->gpu, &supported) || !supported)
        return NOT_SUPPORTED;
    for (int position = 0; position < MAX_MIG_DEVICES; position++) {
        if (read_mig(device->gpu, position, &mig) && mig.gpu_instance_id == gpu_instance_id) {
            *sample = (gpm_sample_t){1, device->gpu, (int)gpu_instance_id, monotonic_seconds()};
            return SUCCESS;
        }
    }
    return INVALID_ARGUMENT;
}

static const char *gpm_key(unsigned metric_id)
{
    switch (metric_id) {
    case 1: return "gpm_graphics_util";
    case 2: return "gpm_sm_util";
    case 3: return "gpm_sm_occupancy";
    case 5: return "gpm_any_tensor_util";
    case 10: return "gpm_dram_bw_util";
    default: return "";
    }
}

int nvmlGpmMetricsGet(gpm_request_t *request)
{
    gpm_sample_t *earlier, *later;
    ENTER();
    if (request->version != 1)
        return ARGUMENT_VERSION_MISMATCH;
    earlier = request->earlier;
    later = request->later;
    if (!earlier || !later || !earlier->filled || !later->filled ||
        earlier->gpu_instance_id != later->gpu_instance_id || later->seconds <= earlier->seconds)
        return INVALID_ARGUMENT;
    for (unsigned i = 0; i < request->metric_count; i++) {
        gpm_metric_t *metric = &request->metrics[i];
        char key[64];
        snprintf(key, sizeof key, "%s_gi%d", gpm_key(metric->id), later->gpu_instance_id);
        if (read_number(key, later->gpu, &metric->value) ||
            read_number(gpm_key(metric->id), later->gpu, &metric->value))
            metric->code = SUCCESS;
        else
            metric->code = NOT_SUPPORTED;
    }
    return SUCCESS;
}
