/* Time, and holding it. */
#include "clock.h"

#include <pthread.h>

enum { MEASURE_NS = 2000000, TRIES = 8 };

struct clock held_clock;
static u64 rate;

/* Both clocks at one moment: the closest of some tries, as a thread may lose its processor between the two. */
static struct clock read_both(void)
{
	struct clock now = {0};
	u64 closest = UINT64_MAX;

	for (int i = 0; i < TRIES; i++) {
		u64 before = real_cycles(), ns = real_ns(), apart = real_cycles() - before;

		if (apart >= closest)
			continue;
		closest = apart;
		now.cycles = before;
		now.ns = ns;
	}
	return now;
}

static void measure(void)
{
	struct clock start = read_both(), end;

	do
		end = read_both();
	while (end.ns - start.ns < MEASURE_NS);
	rate = (end.cycles - start.cycles) * 1000 / (end.ns - start.ns);
}

u64 clock_cycles_per_us(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, measure);
	return rate;
}

int clock_advance(u64 us)
{
	if (!clock_is_held())
		return -EINVAL;
	__atomic_fetch_add(&held_clock.cycles, us * clock_cycles_per_us(), __ATOMIC_RELAXED);
	__atomic_fetch_add(&held_clock.ns, us * 1000, __ATOMIC_RELAXED);
	return 0;
}

int xn_time_hold(void)
{
	if (clock_is_held())
		return -EALREADY;
	held_clock = read_both();
	__atomic_store_n(&held_clock.held, true, __ATOMIC_RELEASE);
	return 0;
}

void xn_time_release(void)
{
	__atomic_store_n(&held_clock.held, false, __ATOMIC_RELEASE);
}
