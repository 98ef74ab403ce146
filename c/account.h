/*
 * Accounts: what each port has had of a worker's time, so that one has no more of it than another that wants some.
 *
 * Deficit round robin by what work costs. Each round brings every port a quantum, which it may keep but not add up; a
 * port's sources are polled for as long as its account is above zero, and what a poll took is charged to it, below zero if
 * it must be. The next round begins when no port that may go on has anything to do: alone, a port never waits.
 *
 * What a poll costs is known afterwards, by the clock, and that is charged. How much it takes on is decided before, by the
 * prices below. Shreedhar and Varghese, "Efficient Fair Queueing Using Deficit Round Robin", 1995.
 */
#ifndef XN_ACCOUNT_H
#define XN_ACCOUNT_H

#include "base.h"

struct account {
	s64 credit; /* cycles */
	u64 round;  /* of the worker's, that the credit is of */
	u64 had;    /* cycles, in all */
};

enum {
	QUANTUM_US = 25,
	/* A debt is not forgiven, but for what is more: a worker may have lost its processor while it was at this port. */
	DEBT_US = 10000,
	/*
	 * More than this no honest work leaves, whose debt is gone as soon as the others have nothing to do: theirs may only be
	 * on its way. Such a debt is paid in time, for as long as others have come to turn lately.
	 */
	DEEP_DEBT_US = 150,
	CONTENDED_US = 2 * DEBT_US,
	/* So much more than its price a poll is charged at most: beyond that it was not the port that took the time. */
	MOST_POLL_US = 300,
	/*
	 * Prices in ns, of a frame, a step of a chain's walk, a segment that a frame is cut into; and the bytes that one
	 * nanosecond copies, or sums up. Estimates: they say where a poll ends, not what it is charged. On a Xeon a frame of 64
	 * bytes in a whole burst took 27 ns, and a step 4.2; segments and bytes were not measured.
	 */
	PRICE_FRAME = 50,
	PRICE_STEP = 3,
	PRICE_SEGMENT = 80,
	BYTES_PER_NS = 8,
	/* An interrupt, most of which is waking whoever sleeps for it. What it takes beyond that the guest itself has made. */
	CALL_US = 30,
	/* What one poll takes on: of prices, of steps, of bytes. One frame may be more than all of that. */
	POLL_NS = QUANTUM_US * 1000,
	POLL_STEPS = 4096,
	POLL_BYTES = 640 << 10
};

/* Brings it to this round. */
static inline struct account *account_at(struct account *a, u64 round, s64 quantum)
{
	u64 rounds = round - a->round;

	if (likely(!rounds))
		return a;
	a->round = round;
	a->credit += rounds > DEBT_US / QUANTUM_US ? quantum * (DEBT_US / QUANTUM_US) : quantum * (s64)rounds;
	if (a->credit > quantum)
		a->credit = quantum;
	return a;
}

static inline void account_charge(struct account *a, u64 cycles, s64 quantum)
{
	const s64 lowest = -quantum * (DEBT_US / QUANTUM_US);

	count(&a->had, cycles);
	a->credit -= (s64)cycles;
	if (unlikely(a->credit < lowest))
		a->credit = lowest;
}

#endif
