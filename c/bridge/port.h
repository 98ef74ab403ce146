/*
 * A port: anything frames enter and leave by. The bridge knows ports by this alone: what is the same of all, and the verbs of
 * their kind.
 */
#ifndef XN_PORT_H
#define XN_PORT_H

#include "clock.h"
#include "frame/packet.h"
#include "frame/view.h"

struct port;
struct virtqueue;
struct worker;
struct xn_bridge;

/* What travels with the views of a burst. */
struct burst {
	struct port *from;
	u32 queue;		      /* of that port, by which it came */
	struct xn_queue_stats *stats; /* of that queue */
	u32 *flood_next;	  /* where the flooding of the first frame goes on; NULL: it is flooded all at once */
	struct virtqueue *lender; /* whose chains they are, if these may be lent; else NULL */
	u64 lent;		  /* views that were, a bit each */
};

/* NULL: there is nothing to do for ports of this kind. A call is for a port and a burst, never for a frame. */
struct port_verbs {
	/* Takes frames, given by their index in views; what is delivered or lost is counted there. */
	void (*deliver)(struct worker *w, struct port *p, struct burst *burst, const struct view *views,
			const u8 *which, u32 n);
	/* Descriptors that it takes now without loss of what comes by a queue of that number, of which `wanted` must go at once; UINT32_MAX: it will drop, not wait. */
	u32 (*room)(struct worker *w, struct port *p, u32 queue, u32 wanted);
	/* The counters of a queue in one direction; NULL: there is no such queue. */
	const struct xn_queue_stats *(*stats)(const struct port *p, u32 queue, enum xn_direction direction);
	/* While parked: what follows from a change of memory, addresses or ports. */
	void (*settle)(struct port *p);
	/* While parked: closes the socket of a queue, and so ends the loans that it has. */
	void (*end_loans)(struct port *p, u32 queue);
	/* Parks the workers, with nothing of the port's lent to anybody. */
	void (*park)(struct port *p);
	/* While parked, of a port that the bridge has no more: frees all that it has, and itself. */
	void (*release)(struct port *p);
};

/* What a port is to whoever made it: the bridge does not ask. */
enum port_kind { PORT_GUEST, PORT_NETDEV };

/* The last frame of a guest that was dropped for what it claimed, for whoever asks who that was; several workers may tell. */
struct offence {
	struct spinlock lock;
	bool news; /* since it was last asked for the remedy */
	u64 at;	   /* cycles; 0: there was none */
	struct xn_offence last;
};

/* ip: that it claims as its own, beside the addresses of the frame; NULL: none. */
static inline void offence_note(struct offence *o, const struct view *v, const struct xn_ip *ip)
{
	/* Somebody writes or reads: that one is the last as well. */
	if (__atomic_exchange_n(&o->lock.held, 1, __ATOMIC_ACQUIRE))
		return;
	o->news = true;
	o->at = cycles() | 1;
	memcpy(o->last.dst, v->head, ETH_ALEN);
	memcpy(o->last.src, v->head + ETH_ALEN, ETH_ALEN);
	o->last.type = load_be16(v->head + 2 * ETH_ALEN);
	o->last.ip = ip ? *ip : (struct xn_ip){0};
	spin_unlock(&o->lock);
}

struct port {
	const struct port_verbs *verbs;
	struct xn_bridge *bridge;
	u32 id;
	enum port_kind kind;
	bool wire;  /* behind it is a network of others' stations; else one guest */
	bool ready; /* there is a ring or socket that takes frames */
	u8 takes;   /* enum view_need, which it sees to itself */
	bool check_source;
	u32 macs_n; /* 0: learned */
	u64 macs[XN_MAX_OWN_MACS];
	/* Of a guest's, by what it has sent. */
	u32 taught;	       /* of the bridge's changes, the last that it has taught ... */
	u64 taught_at;	       /* ... in cycles */
	struct offence spoof;  /* XN_DROP_SPOOF */
	struct offence policy; /* XN_DROP_POLICY */
};

/* Whether the address was given to the port. */
static inline bool port_owns(const struct port *p, u64 mac)
{
	for (u32 i = 0; i < p->macs_n; i++)
		if (p->macs[i] == mac)
			return true;
	return false;
}

#endif
