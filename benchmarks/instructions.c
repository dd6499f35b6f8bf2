/* What instructions.py asks of valgrind: to count from here, and to write down what it has counted. Compiled by the
 * script, with the header that comes with valgrind; without valgrind the requests do nothing.
 */
#include <valgrind/callgrind.h>

void begin(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

void end(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
    CALLGRIND_STOP_INSTRUMENTATION;
}
