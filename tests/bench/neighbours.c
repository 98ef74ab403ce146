/*
 * Drives split rings of many guests from one thread, for neighbours.py, which loads this as a library.
 *
 * A ring's entries were written before and stay as they are: what the device has handed back is made available again at
 * once, or as often as the ring's rate allows. No event index. One thread for all, so that guests do not compete for a CPU.
 */
#include <stdint.h>
#include <time.h>
#include <unistd.h>

struct ring {
	uint16_t *avail, *used; /* the two rings, from their flags on */
	uint32_t num;		/* entries */
	int32_t kick;		/* eventfd */
	double rate;		/* entries that are offered in a second; 0: as many as there is room for */
	uint64_t back;		/* entries that came back */
	uint64_t gap_ns;	/* the longest time without one, but for that in which this thread did not run */
};

enum { MAX_RINGS = 128, FLAGS = 0, INDEX = 1, NO_NOTIFY = 1, OWN_PAUSE_NS = 100000 };

static struct {
	uint16_t avail, used;
	uint64_t posted, last_ns;
} state[MAX_RINGS];

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void see_gap(struct ring *r, uint64_t *since, uint64_t ran_ns)
{
	if (ran_ns - *since > r->gap_ns)
		r->gap_ns = ran_ns - *since;
	*since = ran_ns;
}

/* For so many seconds; the time that it really took. */
double drive(struct ring *rings, uint32_t n, double seconds)
{
	static const uint64_t one = 1;
	const uint64_t start = now_ns(), end = start + (uint64_t)(seconds * 1e9);
	uint64_t now = start, ran = 0; /* ran: a clock that stands while this thread is not running */

	if (n > MAX_RINGS)
		return 0;
	for (uint32_t i = 0; i < n; i++) {
		struct ring *r = &rings[i];

		state[i].avail = r->avail[INDEX];
		state[i].used = __atomic_load_n(&r->used[INDEX], __ATOMIC_ACQUIRE);
		state[i].posted = state[i].last_ns = 0;
		r->back = r->gap_ns = 0;
	}
	while (now < end) {
		for (uint32_t i = 0; i < n; i++) {
			struct ring *r = &rings[i];
			uint16_t used = __atomic_load_n(&r->used[INDEX], __ATOMIC_ACQUIRE);
			uint16_t back = (uint16_t)(used - state[i].used);
			uint64_t room = r->num - (uint16_t)(state[i].avail - used);

			if (back) {
				see_gap(r, &state[i].last_ns, ran);
				r->back += back;
				state[i].used = used;
			}
			if (r->rate > 0) {
				uint64_t due = (uint64_t)((double)(now - start) * 1e-9 * r->rate) - state[i].posted;

				room = room < due ? room : due;
			}
			if (!room)
				continue;
			state[i].posted += room;
			state[i].avail += (uint16_t)room;
			__atomic_store_n(&r->avail[INDEX], state[i].avail, __ATOMIC_RELEASE);
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
			if (!(__atomic_load_n(&r->used[FLAGS], __ATOMIC_RELAXED) & NO_NOTIFY) &&
			    write(r->kick, &one, sizeof(one)) < 0)
				continue; /* full: it is readable */
		}
		uint64_t turn = now_ns() - now;

		now += turn;
		ran += turn < OWN_PAUSE_NS ? turn : OWN_PAUSE_NS;
	}
	for (uint32_t i = 0; i < n; i++)
		see_gap(&rings[i], &state[i].last_ns, ran);
	return (double)(now - start) * 1e-9;
}
