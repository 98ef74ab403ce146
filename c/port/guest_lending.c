/*
 * What a guest lends: whether its frames may be sent from where they lie, and that it has them back before memory, a ring or
 * the port goes away.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "guest.h"
#include "xdp/lending.h"

enum {
	/* How long frames that are being sent are waited for, and how often they are looked at: so long the control thread waits. */
	RECALL_STEPS = 100,
	RECALL_STEP_US = 100
};

/*
 * Header checks bind only what is copied, so a guest whose source address is checked lends nothing. Where others have
 * addresses of their own, which are checked too, it takes an explicit wish.
 */
static enum xn_zerocopy may_lend(const struct guest *g)
{
	const struct xn_bridge *b = g->port.bridge;

	if (g->port.check_source || g->recalling || g->overdue || g->lending.umem == UINT64_MAX || g->alarms.moved)
		return XN_ZEROCOPY_OFF;
	if (!mem_is_huge(g->mem))
		return XN_ZEROCOPY_ON;
	for (u32 i = 0; i < b->ports_n; i++)
		if (b->ports[i] && b->ports[i] != &g->port && !b->ports[i]->wire && b->ports[i]->macs_n)
			return XN_ZEROCOPY_ON;
	return XN_ZEROCOPY_AUTO;
}

void guest_settle_lending(struct port *p)
{
	struct guest *g = guest_of(p);

	g->lending.umem = mem_umem(g->mem);
	g->lending.least = may_lend(g);
}

/* While parked: brings back what can be; true if nothing of the guest's is lent any more. */
static bool recall(struct guest *g, bool patient)
{
	struct caller *caller = &g->port.bridge->events.caller;
	bool done = true;

	for (u32 i = XN_TX; i < 2 * g->pairs; i += 2) {
		struct virtqueue *q = &g->rings[i];
		struct xsk *last = NULL;

		if (q->loans_head == q->loans_tail)
			continue;
		for (u32 at = q->loans_head; at != q->loans_tail; at++) {
			struct xsk *x = q->loans[at & q->loans_mask].borrower;

			if (!x || x == last)
				continue;
			last = x;
			if (patient) {
				xsk_recall(x);
				xsk_reap(x);
			} else {
				x->port->verbs->end_loans(x->port, x->queue);
			}
		}
		if (lending_take_back(q, cycles())) {
			full_fence();
			(void)vring_notify(q, q->used, caller);
			caller_flush(caller);
		}
		done &= q->loans_head == q->loans_tail;
	}
	return done;
}

void guest_park(struct port *p)
{
	struct workers *all = &p->bridge->workers;
	struct guest *g = guest_of(p);
	u32 steps = 0;

	workers_park(all);
	g->recalling = true;
	bridge_settle(p->bridge);
	for (bool patient = true; !recall(g, patient);) {
		/* The kernel is at it: meanwhile the others go on. */
		workers_resume(all);
		usleep(RECALL_STEP_US);
		workers_park(all);
		if (++steps == RECALL_STEPS) {
			/* To close sockets costs the others frames: it happens once. */
			patient = false;
			g->overdue = true;
		}
	}
	g->recalling = false;
}
