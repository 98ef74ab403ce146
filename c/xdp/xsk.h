/*
 * AF_XDP: the four rings of a socket, and the socket itself, on the kernel's uapi.
 *
 * The arena's private frames are cut into sets, one per socket: half of a set circulates through fill and rx ring, the
 * other half through tx and completion ring, so a frame never changes owner and closing a socket loses none. The first
 * socket registers a UMEM, later ones share it (XDP_SHARED_UMEM).
 *
 * A frame that is longer than a buffer is a chain: descriptors of which all but the last have XDP_PKT_CONTD. Only sockets
 * that may get such are bound with XDP_USE_SG, for without it the kernel is faster. That is a property of the UMEM, and
 * each kind of sockets registers its own, of the same memory.
 *
 * Every frame to the wire has TX_METADATA bytes of its buffer in front. Where its checksum is left to the interface, they
 * say so, and the descriptor has XDP_TX_METADATA; the kernel looks at them only then. One that it finds wrong (a field
 * outside the first descriptor) stops the ring for ever. Documentation/networking/xsk-tx-metadata.rst.
 *
 * A chain of a guest may be lent to the kernel: its frame is sent from where it lies. Such a descriptor holds a private
 * frame all the same, as its token. In unaligned mode an address is a base and, in its upper 16 bits, an offset: the
 * offset is the token's number plus one (private frames have none), so the address that comes back names the token.
 * Documentation/networking/af_xdp.rst, net/xdp/xsk_queue.h.
 */
#ifndef XN_XSK_H
#define XN_XSK_H

#include <linux/if_xdp.h>

#include "events.h"
#include "frame/view.h"
#include "memory/arena.h"
#include "ring/loan.h"
#include "source.h"

#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#ifndef XDP_USE_SG /* Linux 6.6 */
#define XDP_USE_SG (1 << 4)
#define XDP_PKT_CONTD (1 << 0)
#endif
#ifndef XDP_TX_METADATA /* Linux 6.8 */
#define XDP_TX_METADATA (1 << 1)
#define XDP_TXMD_FLAGS_CHECKSUM (1 << 1)
#endif
#ifndef XDP_UMEM_TX_METADATA_LEN /* Linux 6.11 */
#define XDP_UMEM_TX_METADATA_LEN (1 << 2)
#endif

/* struct xsk_tx_metadata */
struct tx_metadata {
	u64 flags;
	u16 csum_start; /* from the frame's first byte */
	u16 csum_offset;
	u32 unused;
	u64 launch_time;
};
_Static_assert(sizeof(struct tx_metadata) <= TX_METADATA, "metadata has its room");

struct port;

struct xsk_ring {
	u32 *producer;
	u32 *consumer;
	u32 *flags;
	void *entries;
	u32 cached_producer; /* on a ring that we produce: next entry to write */
	u32 cached_consumer; /* on a ring that we consume: next entry to read */
	u32 mask;
	void *map;
	size_t map_len;
};

/*
 * Where a socket's transmit ring stands with the kernel:
 *
 *            frames are submitted             a kick: all is taken
 *     IDLE ------------------------> OWING ------------------------> IDLE
 *                                    |  ^
 *     a kick: the interface is down  v  |  a kick: not all is taken
 *                                    DOWN -------------------------> IDLE
 *                                             a kick: all is taken
 *
 * and from any of them to GONE, which it never leaves, when a kick finds that there is no such interface.
 */
enum xsk_state {
	XSK_IDLE,
	XSK_OWING, /* there are frames that the kernel has not been told of, or did not take */
	XSK_DOWN,  /* ENETDOWN: frames are dropped until it is up again */
	XSK_GONE   /* ENXIO: and for ever */
};

/*
 * What its receive ring begins with, of a socket that gets frames in several descriptors:
 *
 *     WHOLE ---- a chain without its end ----> UNFINISHED ---- for too long, or of too much ----> SKIPPING
 *       ^ ^------------ its end has come ----------'                                                |
 *       '-------------------------- its end has come, and went the same way ------------------------'
 */
enum xsk_front {
	XSK_WHOLE,
	XSK_UNFINISHED,
	XSK_SKIPPING /* the rest of a chain that was dropped */
};

/* Who touches its transmit and completion ring; unless that is one worker alone, the lock holds. */
enum xsk_users {
	XSK_OF_ONE,
	XSK_LOOKED_INTO, /* and others, for the ends of their loans */
	XSK_OF_SEVERAL	 /* which all transmit on it */
};

struct xsk {
	struct xsk_ring fill, completion, rx, tx;
	struct arena *arena;
	u64 first; /* address of the set's first frame in the arena */
	u64 *free; /* stack of free tx frames: where a frame begins, behind its metadata */
	u32 free_n;
	u32 set;
	u32 max_frame; /* longest frame that the interface carries */
	u32 max_plain; /* longest that is one descriptor */
	enum xsk_front front;
	u64 unfinished_since; /* cycles, when it became that */
	int fd;
	u64 umem;     /* number of its UMEM; 0: no window is in it, nothing can be lent to it */
	u64 umem_len; /* bytes */
	enum xn_zerocopy policy;
	struct loan **lent; /* by token */
	u32 lent_n;
	u32 taken;	/* with it: descriptors that we know it has taken, free-running */
	bool stuck;	/* keeps what is not its own: to be closed and opened again */
	u32 bad_frames; /* descriptors that were not ours */
	enum xsk_state state;
	enum xsk_users users;
	/* For as long as it is open. */
	bool sg;	   /* bound with XDP_USE_SG: longer frames are chains */
	bool tells;	   /* in front of each frame is a struct told */
	bool copies;	   /* a loan ends as soon as the kernel has taken the descriptor: it has a copy by then */
	bool zerocopy;	   /* the driver's */
	bool metadata;	   /* of its UMEM */
	bool leaves_csum;  /* partial checksums are the interface's to complete */
	u64 blocked_since; /* cycles; 0: the kernel takes what it gets */
	u64 rx_dropped;	   /* frames, for other reasons than an empty fill ring; by the control thread */
	struct spinlock lock XN_ALIGNED;
	struct source source;
	/* Whose it is, and who is told of it. */
	struct port *port;
	u32 queue;
	struct events *events;
	struct xn_queue_stats *received;
	struct xn_queue_stats *sent;
};

/* Whether such a socket is to be bound with XDP_USE_SG. */
static inline bool xsk_wants_sg(u32 max_frame, u32 flags)
{
	return max_frame > XN_MAX_PLAIN_FRAME || flags & XN_JOINED;
}

/* Maps the rings of a socket that somebody else has opened (sockets.h), and binds it. It is the caller's still if that fails. */
int xsk_open(struct xsk **out, struct arena *a, const struct umem *u, u32 ifindex, u32 queue, u32 max_frame,
	     enum xn_zerocopy policy, u32 flags);
/* Whatever is lent is returned: the kernel has let go of it, sent or not. */
void xsk_close(struct xsk *x);
/* A returned address that is no private frame's: ends its loan and gives back the token; UINT64_MAX: not ours. */
u64 xsk_return(struct xsk *x, u64 addr);
/* Ends the loans of the descriptors that the kernel has taken. */
void xsk_end_taken(struct xsk *x);
/* Copies what is lent, and not yet begun with, into the tokens; in copy mode, where only our own calls begin with it. */
void xsk_recall(struct xsk *x);
/* Adds its statistics: each lost frame in one of them. */
int xsk_statistics(struct xsk *x, struct xn_xsk_stats *sum);

/* ---- rings that we produce: reserve, write, submit ---- */

static inline u32 xsk_room(struct xsk_ring *r)
{
	/* Acquire: what the kernel consumed is done with before we write over it. */
	return r->mask + 1 - (r->cached_producer - __atomic_load_n(r->consumer, __ATOMIC_ACQUIRE));
}

/* Room in the tx ring; what the kernel has taken is looked at before it is written over. */
static inline u32 xsk_tx_room(struct xsk *x)
{
	return unlikely(x->copies) ? x->tx.mask + 1 - (x->tx.cached_producer - x->taken) : xsk_room(&x->tx);
}

static inline void xsk_submit(struct xsk_ring *r)
{
	/* Release: the entries are written before the index that hands them over. */
	__atomic_store_n(r->producer, r->cached_producer, __ATOMIC_RELEASE);
}

static inline u64 *xsk_addr_at(const struct xsk_ring *r, u32 i)
{
	return (u64 *)r->entries + (i & r->mask);
}

static inline struct xdp_desc *xsk_desc_at(const struct xsk_ring *r, u32 i)
{
	return (struct xdp_desc *)r->entries + (i & r->mask);
}

/* ---- rings that we consume: peek, read, release ---- */

static inline u32 xsk_peek(const struct xsk_ring *r, u32 wanted)
{
	/* Acquire: entries and frames are read after the index that hands them over. */
	return min_u32(__atomic_load_n(r->producer, __ATOMIC_ACQUIRE) - r->cached_consumer, wanted);
}

static inline void xsk_release(struct xsk_ring *r, u32 n)
{
	r->cached_consumer += n;
	__atomic_store_n(r->consumer, r->cached_consumer, __ATOMIC_RELEASE);
}

enum { XSK_OFFSET_SHIFT = 48 };

/* Where an address points: in aligned mode the offset is zero. */
static inline u64 xsk_place(u64 addr)
{
	return (addr & ((1ull << XSK_OFFSET_SHIFT) - 1)) + (addr >> XSK_OFFSET_SHIFT);
}

/* Takes back what the kernel has sent. */
static inline void xsk_reap(struct xsk *x)
{
	u32 n = xsk_peek(&x->completion, x->arena->frames);

	if (unlikely(x->copies))
		xsk_end_taken(x);
	for (u32 i = 0; i < n; i++) {
		u64 addr = *xsk_addr_at(&x->completion, x->completion.cached_consumer + i);

		if (unlikely(addr - x->first >= x->arena->set_size))
			addr = xsk_return(x, addr);
		/* More than we lent, or not ours: the kernel's fault, and no reason to overrun the stack. */
		if (likely(addr - x->first < x->arena->set_size && x->free_n < x->arena->frames / 2))
			x->free[x->free_n++] = addr / XN_FRAME_SIZE * XN_FRAME_SIZE + TX_METADATA;
	}
	if (n)
		xsk_release(&x->completion, n);
}

/* A descriptor for bytes of a window, that takes a token; the loan ends in xsk_reap. */
static inline struct xdp_desc xsk_lend(struct xsk *x, struct loan *loan, const u8 *bytes, u32 len)
{
	u32 token = (u32)((x->free[--x->free_n] - x->first) / XN_FRAME_SIZE) - x->arena->frames / 2;
	u64 offset = token + 1;

	x->lent[token] = loan;
	x->lent_n++;
	loan->borrower = x;
	return (struct xdp_desc){.addr = ((u64)(bytes - x->arena->base) - offset) | offset << XSK_OFFSET_SHIFT,
				 .len = len};
}

/* Gives a received frame back to the kernel; the fill ring holds every receive frame, so there is always room. */
static inline void xsk_refill(struct xsk *x, u64 addr)
{
	*xsk_addr_at(&x->fill, x->fill.cached_producer++) = xsk_place(addr) / XN_FRAME_SIZE * XN_FRAME_SIZE;
}

/* Whether frames go anywhere. */
static inline bool xsk_carries(const struct xsk *x)
{
	return x->state < XSK_DOWN;
}

static inline void xsk_lock(struct xsk *x)
{
	if (x->users != XSK_OF_ONE)
		spin_lock(&x->lock);
}

static inline void xsk_unlock(struct xsk *x)
{
	if (x->users != XSK_OF_ONE)
		spin_unlock(&x->lock);
}

/* Tells the kernel of submitted frames: the state is what it finds. */
void xsk_kick(struct xsk *x);

/* ---- by whoever has not the lock ---- */

/* As xsk_kick; what becomes of the interface is told. */
void xsk_send(struct xsk *x);
/* Takes back what the kernel has sent. */
void xsk_collect(struct xsk *x);
/* A loan takes too long: copies what can be, and asks for the socket to be closed and opened again. */
void xsk_is_overdue(struct xsk *x);

#endif
