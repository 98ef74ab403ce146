/*
 * A chain taken from a transmit ring and not yet handed back: it is lent to the kernel, or came behind one that is. Chains
 * go back in the order in which they came, whatever the order in which loans end.
 */
#ifndef XN_LOAN_H
#define XN_LOAN_H

#include "base.h"

struct xsk;

/*
 * What it takes to hand a chain back. Split: the head. Packed: the buffer id, and the descriptors it took. A number, since
 * two halves stored and then loaded as a whole would wait for each other.
 */
typedef u32 chain_t;

static inline chain_t chain_of(u16 id, u16 descs)
{
	return id | (u32)descs << 16;
}

static inline u16 chain_id(chain_t chain)
{
	return (u16)chain;
}

static inline u16 chain_descs(chain_t chain)
{
	return (u16)(chain >> 16);
}

struct loan {
	struct xsk *borrower; /* NULL: not lent, or returned; the ring's worker and the socket's both look at it */
	chain_t chain;
};

/* What a guest lends; written while the workers are parked. */
struct lending {
	enum xn_zerocopy least; /* that a netdev must ask for to be lent its frames; OFF: none is */
	u64 umem;		/* the first UMEM that has all its memory */
};

#endif
