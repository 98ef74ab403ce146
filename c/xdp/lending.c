#include "lending.h"

#include "clock.h"

/* A loan that takes longer is no more waited for: the socket is taken to be stuck. */
enum { LOAN_US = 1000000 };

/* Hands back what is not lent, up to the first chain that is; returns how many. */
static always_inline u32 take_back(struct virtqueue *q, bool packed)
{
	const struct xsk *looked = NULL;
	struct pushing push = vring_begin(q);
	u32 n = 0;

	while (q->loans_head != q->loans_tail) {
		const struct loan *loan = &q->loans[q->loans_head & q->loans_mask];
		/* Acquire: the kernel is done with the frame before the guest has it again. */
		struct xsk *x = __atomic_load_n(&loan->borrower, __ATOMIC_ACQUIRE);

		if (x && x != looked) {
			xsk_collect(x);
			looked = x;
			x = __atomic_load_n(&loan->borrower, __ATOMIC_ACQUIRE);
		}
		if (x)
			break;
		vring_push(q, &push, loan->chain, 0, packed);
		q->loans_head++;
		n++;
	}
	(void)vring_publish(q, &push, packed, q->log);
	return n;
}

u32 lending_take_back(struct virtqueue *q, u64 now)
{
	u32 n = q->is_packed ? take_back(q, true) : take_back(q, false);

	if (n || q->loans_head == q->loans_tail) {
		q->loans_since = now;
		return n;
	}
	/* Signed: it may have become the oldest in this very turn. */
	if (unlikely((int64_t)(now - q->loans_since) > (int64_t)(clock_cycles_per_us() * LOAN_US))) {
		struct xsk *x = __atomic_load_n(&q->loans[q->loans_head & q->loans_mask].borrower, __ATOMIC_ACQUIRE);

		if (x)
			xsk_is_overdue(x);
		q->loans_since = now;
	}
	return n;
}
