/* NVRTC for hosts without GPUs: compiles CUDA C++ to code of the host, by g++ and device.h. Results are kept in
 * STAND_IN_KERNELS, a folder. See stand_in.h. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 3, COMPILATION = 6 };

struct program { char *source, *result, *log; };

int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return SUCCESS; }
int nvrtcCreateProgram(struct program **out, const char *source, const char *name, int n, const char **a, const char **b) {
    (void)name; (void)a; (void)b;
    if (n) return INVALID;
    *out = calloc(1, sizeof **out);
    (*out)->source = strdup(source);
    return SUCCESS;
}
int nvrtcDestroyProgram(struct program **program) {
    free((*program)->source);
    free((*program)->result);
    free((*program)->log);
    free(*program);
    *program = NULL;
    return SUCCESS;
}

static char *contents(const char *path) {
    FILE *file = fopen(path, "r");
    char *text = NULL;
    size_t length = 0;
    if (!file) return strdup("");
    if (getdelim(&text, &length, 0, file) < 0) { free(text); text = strdup(""); }
    fclose(file);
    return text;
}

/* The name of the function that is a kernel: the word after its attributes. */
static int kernel_name(const char *source, char name[256]) {
    const char *at = strstr(source, "__global__");
    if (!at) return 0;
    for (const char *word; (word = strstr(at, "__launch_bounds__(")) || (word = strstr(at, "__cluster_dims__("));)
        at = strchr(word, ')') + 1;
    return sscanf(at, " %255[A-Za-z0-9_]", name) == 1;
}

/* What is between two texts, the first of which is somewhere after `at`. */
static char *between(const char *at, const char *before, const char *after) {
    const char *start = strstr(at, before) + strlen(before);
    return strndup(start, strstr(start, after) - start);
}

/* The host has no PTX, of which kernels use one instruction on GPUs of this capability, and the shared memory of a block
 * is a pointer here. */
static void write_source(FILE *file, const char *source, const char *name) {
    static const char shared[] = "extern __shared__ __align__(";
    static const char add[] = "asm volatile(\"atom.relaxed.add.f32 %0, [%1], %2;\" : ";
    int waits = strstr(source, "__sync") || strstr(source, "_sync(");
    fprintf(file, "#include \"device.h\"\n");
    for (;;) {
        const char *memory = strstr(source, shared), *sum = strstr(source, add);
        const char *at = memory && (!sum || memory < sum) ? memory : sum;
        if (!at) break;
        fwrite(source, 1, at - source, file);
        if (at == memory) {
            char *variable = between(at, "char ", "[");
            fprintf(file, "char *%s = stand_in_here.shared;", variable);
            free(variable);
            source = strchr(at, ';') + 1;
        } else {
            at += strlen(add);
            char *result = between(at, "\"=f\"(", ")"), *address = between(at, "\"l\"(", ")");
            char *value = between(at, "\"f\"(", ")");
            fprintf(file, "%s = *(float *)%s; *(float *)%s += %s;", result, address, address, value);
            free(result);
            free(address);
            free(value);
            source = strchr(at, ';') + 1;
        }
    }
    fprintf(file, "%s\nSTAND_IN_ENTRY(%s, %d)\n", source, name, waits);
}

#ifdef __x86_64__
#define PROCESSOR "-mf16c "
#else
#define PROCESSOR ""
#endif
static const char compiler[] = "g++ -std=c++17 -O2 " PROCESSOR "-fPIC -shared -w -fno-gnu-unique -fno-strict-aliasing "
                               "-ffp-contract=off -I" INCLUDE " -L" LIBRARIES " -Wl,-rpath," LIBRARIES;

static uint64_t fnv(uint64_t hash, const char *text) {
    for (; *text; text++) hash = (hash ^ (unsigned char)*text) * 1099511628211u;
    return hash;
}

static char *text(const char *format, ...) {
    char *result;
    va_list values;
    va_start(values, format);
    if (vasprintf(&result, format, values) < 0) abort();
    va_end(values);
    return result;
}

static int compile(struct program *program, const char *name, const char *library) {
    /* Several processes may be at the same one. */
    char *part = text("%s.%d", library, getpid()), *source = text("%s.cc", part), *log = text("%s.log", part);
    FILE *file = fopen(source, "w");
    if (!file) { program->log = text("%s cannot be written", source); return COMPILATION; }
    write_source(file, program->source, name);
    fclose(file);
    char *command = text("%s -o %s %s -lcuda >%s 2>&1", compiler, part, source, log);
    if (system(command)) {
        program->log = contents(log);
        return COMPILATION;
    }
    unlink(log);
    if (!getenv("STAND_IN_TRACE")) unlink(source);
    return rename(part, library) ? COMPILATION : SUCCESS;
}

int nvrtcCompileProgram(struct program *program, int count, const char **options) {
    (void)count; (void)options;
    const char *kernels = getenv("STAND_IN_KERNELS");
    char name[256];
    const char *compiled = getenv("STAND_IN_COMPILED");
    int found = kernel_name(program->source, name);
    FILE *told = compiled ? fopen(compiled, "a") : 0;
    if (told) { fprintf(told, "%s\n", found ? name : "no kernel"); fclose(told); }
    if (!kernels || !found) {
        program->log = strdup(kernels ? "there is no kernel in it" : "STAND_IN_KERNELS is not set");
        return COMPILATION;
    }
    char *headers[] = {contents(INCLUDE "/device.h"), contents(INCLUDE "/halves.h")};
    const char *parts[] = {compiler, headers[0], headers[1], program->source};
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < 4; i++) hash = fnv(hash, parts[i]);
    char *library = text("%s/%016llx.so", kernels, (unsigned long long)hash);
    if (access(library, R_OK) && compile(program, name, library)) return COMPILATION;
    program->result = text("// stand-in: %s\n.visible .entry %s\n", library, name);
    return SUCCESS;
}

int nvrtcGetProgramLogSize(struct program *program, size_t *size) {
    *size = program->log ? strlen(program->log) + 1 : 1;
    return SUCCESS;
}
int nvrtcGetProgramLog(struct program *program, char *log) {
    strcpy(log, program->log ? program->log : "");
    return SUCCESS;
}
int nvrtcGetPTXSize(struct program *program, size_t *size) {
    *size = program->result ? strlen(program->result) + 1 : 0;
    return program->result ? SUCCESS : INVALID;
}
int nvrtcGetPTX(struct program *program, char *result) { strcpy(result, program->result); return SUCCESS; }
const char *nvrtcGetErrorString(int code) { return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "an error"; }
