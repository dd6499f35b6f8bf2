/* Many threads that call the C interface at once, for the thread sanitizer: test_fuzz_embed.py compiles it.
 *
 * They share inputs and the choice of the instruction set, which the first call makes; each has an output of its own,
 * whose bits must be those of the first. */
#include "fastattn.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, HEADS = 4, TOKENS = 70, CHANNELS = 24, NUMBERS = HEADS * TOKENS * CHANNELS, CALLS = 6 };

static float query[NUMBERS], key[NUMBERS], value[NUMBERS];
static int threads_of_a_call = 1;

static void *work(void *to)
{
    float *out = to;
    char message[200];
    for (int i = 0; i < CALLS; i++) {
        fastattn_attention_args a;
        const fastattn_view like = {query, 0, TOKENS * CHANNELS * 4, CHANNELS * 4, 4};
        fastattn_attention_init(&a);
        a.num_heads = HEADS, a.queries = a.keys = TOKENS, a.head_dim = a.value_dim = CHANNELS, a.right = i % 2 - 1;
        a.query = a.key = a.value = a.out = like;
        a.key.data = key, a.value.data = value, a.out.data = out;
        const size_t size = fastattn_attention_workspace(&a, 1);
        void *memory = i % 3 ? NULL : aligned_alloc(64, (size + 63) / 64 * 64);
        if (fastattn_attention_check(&a, message, sizeof message) != FASTATTN_OK ||
            fastattn_attention(&a, memory ? 1 : threads_of_a_call, memory, memory ? size : 0) != FASTATTN_OK ||
            fastattn_softmax_f32(out, out, HEADS * TOKENS, CHANNELS, threads_of_a_call) != FASTATTN_OK)
            abort();
        free(memory);
    }
    return fastattn_instruction_set()[0] ? NULL : to;
}

int main(int argc, char **argv)
{
    static float out[THREADS][NUMBERS];
    pthread_t threads[THREADS];
    threads_of_a_call = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 0; i < NUMBERS; i++)
        query[i] = (float)(i % 37) / 9 - 2, key[i] = (float)(i % 41) / 11 - 2, value[i] = (float)(i % 43) / 7;
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, out[i]);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 1; i < THREADS; i++)
        if (memcmp(out[0], out[i], sizeof out[0]) != 0)
            return 1;
    puts("the same bits");
    return 0;
}
