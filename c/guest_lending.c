/*
 * What a guest lends: whether its frames may be sent from where they lie, and that it has them back before memory, a ring or
 * the port goes away.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "bridge.h"

enum {
	/* How long frames that are being sent are waited for, and how often they are looked at: so long the control thread waits. */
	RECALL_STEPS = 100,
	RECALL_STEP_US = 100
};

/*
 * Header checks bind only what is copied, so a guest whose source address is checked lends nothing. Where others have
 * addresses of their own, which are checked too, it takes an explicit wish.
 */
static enum xn_zerocopy may_lend(const struct xn_bridge *b, const struct port *p)
{
	if (p->check_source || p->guest.recalling || p->guest.overdue || p->guest.umem == UINT64_MAX ||
	    p->guest.alarms.moved)
		return XN_ZEROCOPY_OFF;
	if (!mem_is_huge(p->guest.mem))
		return XN_ZEROCOPY_ON;
	for (u32 i = 0; i < b->ports_n; i++)
		if (&b->ports[i] != p && b->ports[i].kind == PORT_GUEST && b->ports[i].macs_n)
			return XN_ZEROCOPY_ON;
	return XN_ZEROCOPY_AUTO;
}

void guests_settle_lending(struct xn_bridge *b)
{
	for (u32 i = 0; i < b->ports_n; i++) {
		struct port *p = &b->ports[i];

		if (p->kind != PORT_GUEST)
			continue;
		p->guest.umem = mem_umem(p->guest.mem);
		p->guest.lends = may_lend(b, p);
	}
}

/* While parked: brings back what can be; true if nothing of the port's is lent any more. */
static bool recall(struct port *p, bool patient)
{
	bool done = true;

	for (u32 i = XN_TX; i < 2 * p->guest.pairs; i += 2) {
		struct virtqueue *q = &p->guest.rings[i];
		struct xsk *last = NULL;

		if (q->loans_head == q->loans_tail)
			continue;
		for (u32 at = q->loans_head; at != q->loans_tail; at++) {
			struct xsk *x = q->loans[at & q->loans_mask].borrower;

			if (x && x != last)
				netdev_recall(last = x, patient);
		}
		if (guest_take_back(q, cycles())) {
			full_fence();
			(void)vring_notify(q, q->used, &p->bridge->events.caller);
			caller_flush(&p->bridge->events.caller);
		}
		done &= q->loans_head == q->loans_tail;
	}
	return done;
}

void guest_park(struct port *p)
{
	u32 steps = 0;

	workers_park(p->bridge);
	p->guest.recalling = true;
	guests_settle_lending(p->bridge);
	for (bool patient = true; !recall(p, patient);) {
		/* The kernel is at it: meanwhile the others go on. */
		workers_resume(p->bridge);
		usleep(RECALL_STEP_US);
		workers_park(p->bridge);
		if (++steps == RECALL_STEPS) {
			/* To close sockets costs the others frames: it happens once. */
			patient = false;
			p->guest.overdue = true;
		}
	}
	p->guest.recalling = false;
}
