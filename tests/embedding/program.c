/* A program without Python, for the tests, in C and C++: program CALLS DATA carries out the calls that the file CALLS
 * lists, on the bytes of the file DATA, and writes these back. A call is an int64 for the number of threads, one for
 * whether to give a workspace, and the bytes of a fastattn_attention_args whose pointers are offsets into DATA, 0 for
 * NULL. Prints the instruction set; ends with 1 where a call is refused, 2 where calls of one thread with a workspace
 * allocate (only where malloc is counted: WRAP_MALLOC, and --wrap=malloc for the linker). */
#include <fastattn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long allocations;
#ifdef WRAP_MALLOC
#ifdef __cplusplus
extern "C" {
#endif
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
    allocations++;
    return __real_malloc(size);
}
#ifdef __cplusplus
}
#endif
#endif

static char *read_file(const char *name, size_t *size)
{
    FILE *file = fopen(name, "rb");
    char *bytes = NULL;
    if (!file)
        return NULL;
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    bytes = (char *)malloc(*size + 1);
    if (bytes && fread(bytes, 1, *size, file) != *size)
        bytes = NULL;
    fclose(file);
    return bytes;
}

static void *moved(const void *offset, char *data) { return offset ? data + (size_t)offset : NULL; }

int main(int count, char **names)
{
    size_t size = 0, data_size = 0;
    char *calls = count == 3 ? read_file(names[1], &size) : NULL;
    char *data = calls ? read_file(names[2], &data_size) : NULL;
    const size_t step = 2 * sizeof(int64_t) + sizeof(fastattn_attention_args);
    if (!data || size % step)
        return 3;
    for (size_t at = 0; at < size; at += step) {
        int64_t numbers[2];
        fastattn_attention_args a;
        char message[300];
        memcpy(numbers, calls + at, sizeof numbers);
        memcpy(&a, calls + at + sizeof numbers, sizeof a);
        fastattn_view *views[] = {&a.query, &a.key, &a.value, &a.out, &a.lse, &a.weights, &a.mask, &a.bias};
        for (size_t i = 0; i < sizeof views / sizeof *views; i++)
            views[i]->data = moved(views[i]->data, data);
        a.key_lengths = (const int64_t *)moved(a.key_lengths, data);
        a.query_lengths = (const int64_t *)moved(a.query_lengths, data);
        a.query_offsets = (const int64_t *)moved(a.query_offsets, data);
        a.alibi_slopes = (const double *)moved(a.alibi_slopes, data);
        a.sinks = (const double *)moved(a.sinks, data);
        a.score_weights = (const double *)moved(a.score_weights, data);
        const int threads = (int)numbers[0];
        const size_t room = numbers[1] ? fastattn_attention_workspace(&a, threads) : 0;
        void *workspace = room ? aligned_alloc(64, (room + 63) / 64 * 64) : NULL;
        const long before = allocations;
        const int status = fastattn_attention(&a, threads, workspace, room);
        const long made = allocations - before;
        free(workspace);
        if (status != FASTATTN_OK) {
            fastattn_attention_check(&a, message, sizeof message);
            fprintf(stderr, "%s %s\n", fastattn_status_text(status), message);
            return 1;
        }
        if (room && threads == 1 && made) {
            fprintf(stderr, "%ld allocations\n", made);
            return 2;
        }
    }
    FILE *file = fopen(names[2], "wb");
    if (!file || fwrite(data, 1, data_size, file) != data_size || fclose(file) != 0)
        return 3;
    printf("%s\n", fastattn_instruction_set());
    free(calls);
    free(data);
    return 0;
}
