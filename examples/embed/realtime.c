/* Takes steady noise out of speech while it is spoken, in C without Python, and meets the deadline of every frame.
 *
 * Non-local means over time, by attention: each frame of 10 ms, a spectrum, is compared with the last second and with a
 * few frames to come, and becomes the mean of those that look like it. Queries and keys are band energies in decibels,
 * normalised; values are logarithms of magnitudes. What the frames have in common stays, their noise averages
 * out; from the mean a gain for each frequency follows (a Wiener gain over a tracked noise floor). Nothing is learned.
 *
 * It runs as an audio callback would: the next frame comes every 10 ms whether the last is done or not. Memory is there
 * before the first frame; within the loop nothing is allocated, locked or started.
 *
 *   realtime [-s seconds] [-r 0] [in.wav] [out.wav]      -r 0: does not wait for the clock; README.md says how to build
 *
 * Without in.wav, or with -, (mono, 16 bits, 16 kHz) it makes speech-like syllables in noise, and can say how much
 * cleaner they are. Prints the latencies of frames and how many were late. Ends with 1 if fastattn refuses a call, 2
 * for bad files.
 */
#define _GNU_SOURCE
#include <fastattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    RATE = 16000,
    HOP = 160,    /* samples a frame: 10 ms */
    WINDOW = 320, /* samples that a frame looks at */
    SIZE = 512,   /* of the Fourier transform */
    BINS = SIZE / 2 + 1,
    BANDS = 24,
    LEFT = 100, /* frames of the past that a frame sees */
    RIGHT = 4,  /* and to come: what comes out is 40 ms behind */
    SPAN = LEFT + 1 + RIGHT,
    ROOM = 4 * SPAN /* frames that fit before the last SPAN are moved to the front */
};

/* All that the loop needs, of fixed size. */
typedef struct {
    float keys[ROOM][BANDS], values[ROOM][BINS]; /* frames, the newest at `frames - 1` */
    float spectra[ROOM][SIZE];                   /* real and imaginary parts of BINS - 1 frequencies, interleaved */
    float mean[BINS], floor[BINS], gain[BINS];
    float samples[WINDOW], tail[SIZE]; /* the input that a window needs, the output that overlaps the next one */
    int frames;
    long heard;
    fastattn_attention_args args;
    void *workspace;
    size_t workspace_size;
} denoiser;

static float window[WINDOW];
static float band_of[BINS][BANDS];

/* An in-place transform of SIZE complex numbers, interleaved. */
static void fourier(float *x, int inverse)
{
    for (int i = 1, j = 0; i < SIZE; i++) {
        int bit = SIZE >> 1;
        for (; j & bit; bit >>= 1)
            j ^= bit;
        j |= bit;
        if (i < j) {
            float t = x[2 * i];
            x[2 * i] = x[2 * j], x[2 * j] = t;
            t = x[2 * i + 1], x[2 * i + 1] = x[2 * j + 1], x[2 * j + 1] = t;
        }
    }
    for (int half = 1; half < SIZE; half *= 2) {
        const double angle = (inverse ? M_PI : -M_PI) / half;
        for (int k = 0; k < half; k++) {
            const float c = (float)cos(angle * k), s = (float)sin(angle * k);
            for (int i = k; i < SIZE; i += 2 * half) {
                float *a = x + 2 * i, *b = x + 2 * (i + half);
                const float re = b[0] * c - b[1] * s, im = b[0] * s + b[1] * c;
                b[0] = a[0] - re, b[1] = a[1] - im;
                a[0] += re, a[1] += im;
            }
        }
    }
}

static double mel(double hertz) { return 1127 * log(1 + hertz / 700); }

static void make_tables(void)
{
    for (int i = 0; i < WINDOW; i++)
        window[i] = (float)sqrt(0.5 - 0.5 * cos(2 * M_PI * (i + 0.5) / WINDOW)); /* its square adds up to 1 */
    for (int bin = 0; bin < BINS; bin++) {
        const double at = mel((double)bin * RATE / SIZE) / mel(RATE / 2.0) * (BANDS + 1) - 1;
        for (int band = 0; band < BANDS; band++)
            band_of[bin][band] = (float)fmax(0, 1 - fabs(at - band));
    }
}

static int open_denoiser(denoiser *d)
{
    memset(d, 0, sizeof *d);
    for (int bin = 0; bin < BINS; bin++)
        d->floor[bin] = 1e30f;
    fastattn_attention_init(&d->args);
    fastattn_attention_args *a = &d->args;
    a->queries = 1, a->keys = SPAN, a->head_dim = BANDS, a->value_dim = BINS;
    a->scale = 12; /* keys are of length 1: frames of a correlation of 0.8 count a tenth of the frame itself */
    a->query.col = a->key.col = a->value.col = a->out.col = sizeof(float);
    a->key.row = sizeof d->keys[0], a->value.row = sizeof d->values[0];
    a->query.data = a->key.data = d->keys, a->value.data = d->values, a->out.data = d->mean;
    /* Enough for any number of keys up to SPAN: a workspace is at most as large as that of the most. */
    for (a->keys = 1; a->keys <= SPAN; a->keys++) {
        const size_t size = fastattn_attention_workspace(a, 1);
        d->workspace_size = size > d->workspace_size ? size : d->workspace_size;
    }
    d->workspace_size = (d->workspace_size + 63) / 64 * 64;
    d->workspace = aligned_alloc(64, d->workspace_size);
    return d->workspace ? 0 : -1;
}

/* The newest frame's spectrum, key and value. */
static void hear(denoiser *d, const float *samples)
{
    float x[2 * SIZE] = {0}, bands[BANDS] = {0}, mean = 0, length = 1e-6f;
    if (d->frames == ROOM) {
        memmove(d->keys, d->keys + ROOM - SPAN, SPAN * sizeof d->keys[0]);
        memmove(d->values, d->values + ROOM - SPAN, SPAN * sizeof d->values[0]);
        memmove(d->spectra, d->spectra + ROOM - SPAN, SPAN * sizeof d->spectra[0]);
        d->frames = SPAN;
    }
    memmove(d->samples, d->samples + HOP, (WINDOW - HOP) * sizeof *samples);
    memcpy(d->samples + WINDOW - HOP, samples, HOP * sizeof *samples);
    for (int i = 0; i < WINDOW; i++)
        x[2 * i] = d->samples[i] * window[i];
    fourier(x, 0);
    memcpy(d->spectra[d->frames], x, sizeof d->spectra[0]);
    for (int bin = 0; bin < BINS; bin++) {
        const float power = x[2 * bin] * x[2 * bin] + x[2 * bin + 1] * x[2 * bin + 1] + 1e-9f;
        d->values[d->frames][bin] = 0.5f * logf(power);
        for (int band = 0; band < BANDS; band++)
            bands[band] += band_of[bin][band] * power;
    }
    for (int band = 0; band < BANDS; band++)
        bands[band] = logf(bands[band] + 1e-9f), mean += bands[band] / BANDS;
    for (int band = 0; band < BANDS; band++)
        bands[band] -= 0.7f * mean, length += bands[band] * bands[band]; /* loudness counts, but less than colour */
    for (int band = 0; band < BANDS; band++)
        d->keys[d->frames][band] = bands[band] / sqrtf(length);
    d->frames++;
    d->heard++;
}

/* The frame RIGHT before the newest, cleaned; returns fastattn's status. */
static int clean(denoiser *d, float *samples)
{
    float x[2 * SIZE] = {0};
    const int now = d->frames - 1 - RIGHT;
    memset(samples, 0, HOP * sizeof *samples);
    if (now < 0)
        return FASTATTN_OK;
    const int first = now > LEFT ? now - LEFT : 0;
    d->args.keys = d->frames - first;
    d->args.query.data = d->keys[now];
    d->args.key.data = d->keys[first];
    d->args.value.data = d->values[first];
    const int status = fastattn_attention(&d->args, 1, d->workspace, d->workspace_size);
    if (status != FASTATTN_OK)
        return status;
    for (int bin = 0; bin < BINS; bin++) {
        /* The floor falls at once and rises by 1 dB a second: what is always there. */
        const float power = expf(2 * d->mean[bin]);
        d->floor[bin] = power < d->floor[bin] ? power : d->floor[bin] * 1.0023f;
        const float noise = 1.6f * d->floor[bin], gain = power > noise ? 1 - noise / power : 0;
        d->gain[bin] = gain > 0.1f ? gain : 0.1f; /* at most 20 dB less: silence sounds natural */
    }
    for (int bin = 0; bin < BINS - 1; bin++) {
        x[2 * bin] = d->spectra[now][2 * bin] * d->gain[bin];
        x[2 * bin + 1] = d->spectra[now][2 * bin + 1] * d->gain[bin];
        if (bin)
            x[2 * (SIZE - bin)] = x[2 * bin], x[2 * (SIZE - bin) + 1] = -x[2 * bin + 1];
    }
    fourier(x, 1);
    for (int i = 0; i < WINDOW; i++)
        d->tail[i] += x[2 * i] / SIZE * window[i];
    memcpy(samples, d->tail, HOP * sizeof *samples);
    memmove(d->tail, d->tail + HOP, (SIZE - HOP) * sizeof *samples);
    memset(d->tail + SIZE - HOP, 0, HOP * sizeof *samples);
    return FASTATTN_OK;
}

/* Sound */

static double uniform(void)
{
    static unsigned long long state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

/* Syllables: a voice whose pitch moves, through three formants that change, with pauses. */
static void speak(float *speech, long count)
{
    double phase = 0, y[3][2] = {{0}}, formant[3] = {500, 1500, 2500}, pitch = 120, loud = 0;
    long end = 0;
    int voiced = 0;
    for (long i = 0; i < count; i++) {
        if (i >= end) {
            voiced = !voiced || uniform() < 0.6;
            end = i + (long)(RATE * (0.12 + 0.25 * uniform()));
            if (voiced) {
                formant[0] = 300 + 500 * uniform(), formant[1] = 900 + 1300 * uniform();
                formant[2] = 2300 + 700 * uniform(), pitch = 90 + 80 * uniform();
            }
        }
        loud += ((voiced ? 1.0 : 0.0) - loud) / (0.02 * RATE);
        phase += pitch * (1 + 0.02 * sin(2 * M_PI * 5 * (double)i / RATE)) / RATE;
        double sound = phase >= 1 ? 1 : 0;
        phase -= floor(phase);
        for (int f = 0; f < 3; f++) {
            const double r = exp(-M_PI * (60 + 30 * f) / RATE), turn = 2 * M_PI * formant[f] / RATE;
            const double next = sound * (1 - r) * 3 + 2 * r * cos(turn) * y[f][0] - r * r * y[f][1];
            y[f][1] = y[f][0], y[f][0] = next;
            sound = next;
        }
        speech[i] = (float)(loud * sound);
    }
}

static double power_of(const float *x, const float *minus, long count)
{
    double sum = 1e-20;
    for (long i = 0; i < count; i++)
        sum += (x[i] - (minus ? minus[i] : 0)) * (x[i] - (minus ? minus[i] : 0));
    return sum;
}

static unsigned number(const unsigned char *bytes, int count)
{
    unsigned n = 0;
    for (int i = count - 1; i >= 0; i--)
        n = n << 8 | bytes[i];
    return n;
}

/* Samples of a WAV file, or NULL. */
static float *read_wav(const char *name, long *count)
{
    unsigned char head[12], chunk[8], format[16] = {0};
    FILE *file = fopen(name, "rb");
    float *samples = NULL;
    if (file && fread(head, 1, 12, file) == 12 && memcmp(head, "RIFF", 4) == 0 && memcmp(head + 8, "WAVE", 4) == 0) {
        while (!samples && fread(chunk, 1, 8, file) == 8) {
            const unsigned size = number(chunk + 4, 4);
            if (memcmp(chunk, "fmt ", 4) == 0 && size >= 16 && fread(format, 1, 16, file) == 16) {
                fseek(file, (long)(size + size % 2 - 16), SEEK_CUR);
            } else if (memcmp(chunk, "data", 4) == 0) {
                if (number(format, 2) != 1 || number(format + 2, 2) != 1 || number(format + 4, 4) != RATE ||
                    number(format + 14, 2) != 16)
                    break;
                samples = calloc(size / 2 + 1, sizeof *samples);
                for (*count = 0; samples && *count < (long)(size / 2) && fread(chunk, 1, 2, file) == 2; ++*count)
                    samples[*count] = (float)(short)number(chunk, 2) / 32768;
            } else {
                fseek(file, (long)(size + size % 2), SEEK_CUR);
            }
        }
    }
    if (file)
        fclose(file);
    return samples;
}

static int write_wav(const char *name, const float *samples, long count)
{
    unsigned char head[44] = "RIFF....WAVEfmt \20\0\0\0\1\0\1\0....\0\0\0\0\2\0\20\0data....";
    const unsigned numbers[4][2] = {
        {4, 36 + 2 * (unsigned)count}, {24, RATE}, {28, 2 * RATE}, {40, 2 * (unsigned)count}};
    FILE *file = fopen(name, "wb");
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < 4; i++)
            head[numbers[n][0] + (unsigned)i] = (unsigned char)(numbers[n][1] >> 8 * i);
    if (!file)
        return -1;
    fwrite(head, 1, 44, file);
    for (long i = 0; i < count; i++) {
        const float x = fmaxf(-1, fminf(1, samples[i]));
        const int n = (int)lrintf(x * 32767);
        const unsigned char bytes[2] = {(unsigned char)(n & 255), (unsigned char)(n >> 8 & 255)};
        fwrite(bytes, 1, 2, file);
    }
    return fclose(file);
}

/* Time */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_until(double when)
{
    for (double left; (left = when - seconds()) > 0;) {
        const struct timespec t = {(time_t)left, (long)((left - floor(left)) * 1e9)};
        nanosleep(&t, NULL); /* macOS has no clock_nanosleep */
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words)
{
    double length = 10, clock = 1;
    const char *files[2] = {NULL, NULL};
    for (int i = 1, n = 0; i < count; i++) {
        if (strcmp(words[i], "-s") == 0 && i + 1 < count)
            length = atof(words[++i]);
        else if (strcmp(words[i], "-r") == 0 && i + 1 < count)
            clock = atof(words[++i]);
        else if (n < 2)
            files[n++] = words[i];
    }
    long samples = (long)(length * RATE);
    float *speech = NULL, *sound = NULL;
    const int is_made = !files[0] || strcmp(files[0], "-") == 0;
    if (is_made) {
        speech = calloc((size_t)samples + HOP, sizeof *speech);
        sound = calloc((size_t)samples + HOP, sizeof *sound);
        if (!speech || !sound)
            return 2;
        speak(speech, samples);
        /* Noise of the speech's power, so a ratio of 0 dB. */
        const double level = sqrt(power_of(speech, NULL, samples) / (double)samples * 12);
        for (long i = 0; i < samples; i++)
            sound[i] = speech[i] + (float)(level * (uniform() - 0.5));
    } else if (!(sound = read_wav(files[0], &samples))) {
        fprintf(stderr, "%s is no WAV file of one channel, 16 bits and %d Hz\n", files[0], RATE);
        return 2;
    }
    const long frames = samples / HOP;
    const double period = (double)HOP / RATE;
    static denoiser d;
    float *cleaned = calloc((size_t)samples + HOP, sizeof *cleaned);
    double *latency = calloc((size_t)frames + 1, sizeof *latency);
    make_tables();
    if (!cleaned || !latency || frames == 0 || open_denoiser(&d) < 0)
        return 2;

    int late = 0;
    const double begin = seconds();
    for (long frame = 0; frame < frames; frame++) {
        const double due = begin + (double)(frame + 1) * period * clock; /* when its last sample comes */
        if (clock > 0)
            wait_until(due);
        const double from = clock > 0 ? due : seconds();
        hear(&d, sound + frame * HOP);
        const int status = clean(&d, cleaned + frame * HOP);
        if (status != FASTATTN_OK) {
            char message[200];
            fastattn_attention_check(&d.args, message, sizeof message);
            fprintf(stderr, "frame %ld: %s %s\n", frame, fastattn_status_text(status), message);
            return 1;
        }
        latency[frame] = seconds() - from;
        late += latency[frame] > period;
    }
    qsort(latency, (size_t)frames, sizeof *latency, ascending);
    printf("%ld frames of %d ms on %s, each over %d frames before and %d after it; %.1f KiB of workspace\n", frames,
           1000 * HOP / RATE, fastattn_instruction_set(), LEFT, RIGHT, (double)d.workspace_size / 1024);
    printf("latency in ms: median %.3f, 99 %% %.3f, worst %.3f; deadline %.0f, missed by %d frames\n",
           1e3 * latency[frames / 2], 1e3 * latency[frames - 1 - frames / 100], 1e3 * latency[frames - 1], 1e3 * period,
           late);
    if (is_made) {
        /* What comes out is RIGHT frames and the overlap of a window late; the first second finds the noise. */
        const long delay = RIGHT * HOP + WINDOW - HOP, skip = RATE < samples / 4 ? RATE : samples / 4;
        const long rest = samples - delay - skip - HOP;
        if (rest > 0)
            printf("speech over noise in dB: %.1f before, %.1f after\n",
                   10 * log10(power_of(speech + skip, NULL, rest) / power_of(sound + skip, speech + skip, rest)),
                   10 * log10(power_of(speech + skip, NULL, rest) /
                              power_of(cleaned + skip + delay, speech + skip, rest)));
    }
    if (files[1] && write_wav(files[1], cleaned, samples) < 0) {
        fprintf(stderr, "cannot write %s\n", files[1]);
        return 2;
    }
    free(d.workspace);
    free(speech), free(sound), free(cleaned), free(latency);
    return 0;
}
