/*
 * Rewrites words of a guest's memory as fast as it can, until it is killed.
 *
 *   rewriter FD SIZE < words
 *
 * FD is the memory, SIZE its bytes. Each line of the input is an offset (a multiple of 8) and the values that the word
 * there takes, in hexadecimal. A word is stored whole, as a driver stores a descriptor's half.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

enum { MAX_WORDS = 1024, MAX_VALUES = 16 };

static struct word {
	uint64_t *at;
	uint32_t n;
	uint64_t values[MAX_VALUES];
} words[MAX_WORDS];

int main(int argc, char **argv)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (argc != 3)
		return 2;
	size_t size = strtoul(argv[2], NULL, 10);
	uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
	char line[1024];
	uint32_t n = 0;

	if (memory == MAP_FAILED)
		return 1;
	while (n < MAX_WORDS && fgets(line, sizeof(line), stdin)) {
		struct word *w = &words[n];
		uint64_t offset = 0;

		for (char *p = strtok(line, " \n"); p; p = strtok(NULL, " \n")) {
			if (!w->at) {
				offset = strtoull(p, NULL, 16);
				if (offset % 8 || offset > size - 8)
					return 3;
				w->at = (uint64_t *)(memory + offset);
			} else if (w->n < MAX_VALUES) {
				w->values[w->n++] = strtoull(p, NULL, 16);
			}
		}
		n += w->n > 0;
	}
	if (!n)
		return 4;
	/* From then on none has another value than its own. */
	for (uint32_t i = 0; i < n; i++)
		__atomic_store_n(words[i].at, words[i].values[0], __ATOMIC_RELAXED);
	puts("running");
	fflush(stdout);
	for (uint64_t dice = 88172645463325252u;;) {
		dice ^= dice << 13;
		dice ^= dice >> 7;
		dice ^= dice << 17;
		struct word *w = &words[(uint32_t)dice % n];

		__atomic_store_n(w->at, w->values[(dice >> 32) % w->n], __ATOMIC_RELAXED);
	}
}
