/*
 * A worker: one thread, the only one to take from the sources it owns.
 *
 * Its turn: poll every active source, kick the sockets that were given frames, one fence, then the notification checks
 * that the turn has left. With nothing active it sleeps in epoll. The control thread parks all workers at the end of a
 * turn before it changes anything that they use.
 */
#ifndef XN_WORKER_H
#define XN_WORKER_H

#include <pthread.h>

#include "account.h"
#include "caller.h"
#include "clock.h"
#include "frame/gro.h"
#include "frame/gso.h"
#include "frame/view.h"
#include "ring/vring.h"
#include "source.h"
#include "xdp/xsk.h"

enum {
	WORKER_SOURCES = 2 * XN_MAX_PORTS * XN_MAX_PAIRS, /* a receive and a transmit ring each */
	WORKER_PIECES = 4 * VRING_MAX_PIECES,
	WORKER_CHAINS = 2 * VRING_MAX_PIECES,
	GROUP_BATCH = 16,
	GROUP_FRAME = XN_MAX_FRAME + XN_CACHELINE /* several in one, and a VLAN tag */
};

struct parking {
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	bool wanted; /* by the control thread; read by workers without the mutex */
	u32 parked;
	u64 since; /* ns, when it began to be wanted */
	u64 total; /* ns, so far */
};

struct worker {
	struct workers *all; /* it is one of */
	u32 id;
	u64 cycles_per_us;
	pthread_t thread;
	int epoll_fd;
	int wake_fd; /* eventfd: look at parking.wanted and asked */
	bool asked;  /* another thread wants a source of this worker to be polled */
	u32 now;     /* seconds, monotonic; refreshed at least every turn of the epoll set */
	u64 turn;    /* cycles, when this turn began */
	u64 looked;  /* cycles, when all sources were last polled, asleep or not */

	struct source *sources[WORKER_SOURCES]; /* owned; written while parked */
	u8 gap_sources[XN_GAP];
	u32 sources_n;
	struct source *active[WORKER_SOURCES];
	u8 gap_active[XN_GAP];
	u32 active_n;

	struct account accounts[XN_MAX_PORTS];
	u64 round;
	s64 quantum;	       /* cycles */
	struct account *mover; /* whose work was done last */
	u64 mover_since;       /* cycles, when it was another's before */
	u64 paid;	       /* cycles, up to when time has paid debts */
	struct account *payer; /* for whom it works now */
	u64 price;	       /* ns, of what was taken on in this poll */
	u64 clock;	       /* cycles, when they were last read in this turn */

	struct {
		struct virtqueue *ring;
		struct account *payer; /* who has made it owe that */
	} notify[WORKER_SOURCES];      /* rings that owe a notification check */
	u8 gap_notify[XN_GAP];
	u32 notify_n;
	struct caller caller;
	struct xsk *kick[XN_MAX_PORTS * XN_MAX_NETDEV_QUEUES]; /* sockets with frames that the kernel has not taken */
	u8 gap_kick[XN_GAP];
	u32 kick_n;
	u32 kick_frames;			       /* given to them since the last kick */
	u32 kick_turns;				       /* that these have waited for */
	u64 kick_cycles;			       /* that a frame costs the kernel to take, as it was lately */
	struct virtqueue *lenders[WORKER_SOURCES / 2]; /* rings with chains that wait for a loan to end */
	u8 gap_lenders[XN_GAP];
	u32 lenders_n;
	u64 sent_call_delay; /* cycles, in a stream */
	u32 lenders_wait;    /* ms to sleep for them, the longer the longer it takes */

	struct xn_worker_stats stats XN_ALIGNED;

	/* Scratch of one burst. Source pieces and delivery pieces are apart: both live at once. */
	struct view views[XN_BURST] XN_ALIGNED; /* a line each */
	u8 gap_views[XN_GAP];
	struct piece pieces[WORKER_PIECES];
	u8 gap_pieces[XN_GAP];
	u8 headers[XN_BURST][PACKET_HEADERS + XN_GAP]; /* snapshots, of views that need something */
	struct gso_room cut;
	struct gro_room joined;
	u8 gap_joined[XN_GAP];
	/* Delivery: a burst of plain frames has room behind what the others take. */
	struct piece to_pieces[WORKER_PIECES + XN_BURST] XN_ALIGNED;
	u8 gap_to_pieces[XN_GAP];
	struct {
		chain_t chain;
		u32 capacity;
	} chains[WORKER_CHAINS + XN_BURST];
	u8 gap_chains[XN_GAP];
	u8 (*group_frames)[GROUP_FRAME]; /* GROUP_BATCH of them, for the worker that owns group sockets */
};

/* Of one bridge. */
struct workers {
	u32 n;
	struct worker *each[XN_MAX_WORKERS];
	u64 spin_cycles; /* a source is polled so long after its last frame */
	bool running;
	struct parking parking;
};

/* Makes as many as the configuration has; 0. What there is by then workers_release frees. */
int workers_init(struct workers *all, const struct xn_bridge_config *config);
void workers_release(struct workers *all);
/* While they do not run, or are parked. */
void workers_set_spin(struct workers *all, u32 us);
/* They run, all or none; and are joined. */
int workers_start(struct workers *all);
void workers_stop(struct workers *all);

/* The thread: as long as they are to run. */
void *worker_run(void *worker);
/* Ends its sleep. */
void worker_wake(struct worker *w);
/* What its thread does, over and over: a turn; how long there is nothing to do then unless something wakes it, in ms. */
int worker_turn(struct worker *w);
/* And with nothing active, or now and then: takes what has woken sources, and waits for that as long. */
void worker_wait(struct worker *w, int timeout_ms);

/* Parks every running worker, until they are resumed. Control thread only; does not nest, or nobody could be let go on meanwhile. */
void workers_park(struct workers *all);
void workers_resume(struct workers *all);
/* Returns when every running worker has looked at its events, and then taken a whole turn. Control thread only. */
void workers_go_round(struct workers *all);

/* While parked: gives a port's source to a worker (it is polled at least once, whatever its fd says), or takes it away. */
int worker_add_source(struct worker *w, struct source *s, u32 port);
void worker_remove_source(struct source *s);
/* Has a source of this worker polled for as long as if it had just brought something. */
void worker_keep_active(struct worker *w, struct source *s);
/* Has the source's worker poll it; called by any of them. */
void worker_ask(struct worker *w, struct source *s);
/* While parked: forget what they owe this ring or socket. */
void workers_forget_ring(struct workers *all, const struct virtqueue *q);
void workers_forget_xsk(struct workers *all, const struct xsk *x);

/* The owner of a queue, or pair, of any port. */
static inline struct worker *worker_of(const struct workers *all, u32 queue)
{
	return all->each[queue % all->n];
}

/* Says where the worker is now, to whoever looks whether it goes on. */
static inline void worker_is_at(struct worker *w, u32 place)
{
	__atomic_store_n(&w->stats.at, place, __ATOMIC_RELAXED);
}

static inline void worker_delivers_to(struct worker *w, u32 place)
{
	__atomic_store_n(&w->stats.to, place, __ATOMIC_RELAXED);
}

/* When the guest is told of what it has back now. */
static inline void worker_set_due(const struct worker *w, struct virtqueue *q)
{
	q->owed = q->used;
	q->call_due = w->turn + (q->index % 2 == XN_TX && q->source.streams ? w->sent_call_delay : 0);
}

/* The ring owes a notification check at the end of the turn; under the ring's lock, if it is shared. */
static inline void worker_owes(struct worker *w, struct virtqueue *q)
{
	if (q->dirty & 1u << w->id)
		return;
	q->dirty |= 1u << w->id;
	worker_set_due(w, q);
	w->notify[w->notify_n].ring = q;
	w->notify[w->notify_n++].payer = w->payer;
}

/* The ring has chains that wait for a loan to end. Of each transmit ring that the worker owns there is one entry. */
static inline void worker_waits(struct worker *w, struct virtqueue *q)
{
	if (q->waits)
		return;
	q->waits = true;
	w->lenders[w->lenders_n++] = q;
	w->lenders_wait = 1;
}

/* The socket has frames that the kernel has not been told of; under the socket's lock, if it is shared. */
static inline void worker_owes_kick(struct worker *w, struct xsk *x, u32 frames)
{
	w->kick_frames += frames;
	account_charge(w->payer, frames * w->kick_cycles, w->quantum);
	/* Of each frame that is sent, the kernel wakes whoever waits for the socket. */
	worker_keep_active(w, &x->source);
	if (w->kick_n && w->kick[w->kick_n - 1] == x)
		return;
	for (u32 i = 0; i < w->kick_n; i++)
		if (w->kick[i] == x)
			return;
	x->state = XSK_OWING;
	w->kick[w->kick_n++] = x;
}

#endif
