/*
 * One virtqueue as the device sees it, and its verbs, the same for both layouts:
 *
 *   peek     is there a chain at the cursor                pop      take it, as pieces; the cursor moves behind it
 *   push     hand a chain back                             publish  make what was pushed visible
 *   arm      ask for a kick at a chain to come             notify   interrupt the guest, if it asked for it
 *
 * The cursor is the caller's: chains are taken for good when it is stored in `next`, and what is not simply stays in the
 * ring. The core keeps its own copy of every index that it writes and never reads those back. A fault in what the guest
 * wrote latches the ring broken: it reads as empty until it is started anew.
 *
 * `packed` and `logged` are constants wherever these verbs are used: the layout, and whether writes are marked in the dirty
 * log, are chosen once per ring, by which poll or deliver function the ring has. virtio 1.3, sections 2.7 (split), 2.8
 * (packed) and 5.1.6 (net).
 */
#ifndef XN_VRING_H
#define XN_VRING_H

#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>

#include "backlog.h"
#include "events.h"
#include "loan.h"
#include "memory/dirty.h"
#include "source.h"

struct port;

enum {
	/* Most pieces that one chain may have; frames have at most 64 KiB, and drivers far fewer pieces than this. */
	VRING_MAX_PIECES = 1024,
	/* Most descriptors, be they empty. A packed chain is still walked to its end, for that is where the next one starts. */
	VRING_MAX_DESCS = 2 * VRING_MAX_PIECES,
	/* Steps: what a walk costs, in descriptors that lie where they should; one that is read byte by byte is as many. */
	STEPS_UNALIGNED = 8
};

/* Where gcov counts, each line is there once: not once for split and once for packed, wherever it is used. */
#ifdef XN_COUNTED
#define always_inline inline
#else
#define always_inline inline __attribute__((always_inline))
#endif

/* A place in a ring. Split: a free-running index. Packed: below the ring's size, with the wrap counter (0 or 1). */
struct cursor {
	u16 pos;
	u16 wrap;
};

/* Packed: as indices and event indices have it, 15 bits and the wrap counter. */
static inline u16 off_wrap_of(struct cursor c)
{
	return (u16)(c.pos | c.wrap << VRING_PACKED_EVENT_F_WRAP_CTR);
}

static inline struct cursor cursor_of(u16 off_wrap)
{
	return (struct cursor){off_wrap & ((1u << VRING_PACKED_EVENT_F_WRAP_CTR) - 1),
			       off_wrap >> VRING_PACKED_EVENT_F_WRAP_CTR};
}

struct virtqueue {
	/* Written by the control thread, while the workers are parked. */
	union {
		struct {
			struct vring_desc *desc;
			struct vring_avail *avail;
			struct vring_used *used;
		} split;
		struct {
			struct vring_packed_desc *desc;
			const struct vring_packed_desc_event *driver;
			struct vring_packed_desc_event *device;
		} packed;
	};
	const struct mem *mem;
	u32 num;
	u8 hdr_len;
	bool is_packed;
	bool event_idx;
	bool indirect;
	bool mergeable;
	bool in_order;
	bool started;
	bool enabled;
	bool shared; /* several workers use it: the lock holds */
	int kick_fd;
	int call_fd;
	int err_fd;
	struct port *port;
	struct mem_alarms *alarms; /* of the memory that it lies in */
	struct events *events;
	const struct lending *lending;
	u32 index; /* 2p: receive ring of pair p, 2p + 1: transmit */

	/* Written by the owner. */
	struct spinlock lock XN_ALIGNED;
	struct cursor next;	 /* to take from */
	struct cursor used;	 /* to push to, and published */
	struct cursor signalled; /* `used` at the last notification check */
	u16 avail_idx;		 /* split: the guest's index, as last read */
	u32 unchecked; /* descriptors (split: chains) published since the last notification check; may be more than a lap */
	bool signalled_valid;
	bool armed;	      /* packed: the device's off_wrap is where a kick is wanted, not where `used` stands */
	u8 broken;	      /* enum xn_broken */
	bool has_broken;      /* since the control thread last asked */
	u32 hint;	      /* memory region of the last translation */
	s32 steps_left;	      /* receive: that chains may take to walk before frames are dropped instead */
	struct cursor wanted; /* receive: where a chain has to come before the first frame that waits is tried again */
	struct backlog backlog; /* receive: frames that wait */
	u32 flood_next;		/* transmit: the port at which the flooding of the next chain's frame goes on */
	u32 dirty;		/* workers that owe a notification check, one bit each */
	u64 call_due;		/* cycles, when the guest is to be told of what it has back ... */
	struct cursor owed;	/* ... up to here; where `used` stood when that was set */
	bool slow_call;		/* the last interrupt took longer than one should */
	struct source source;

	/* A transmit ring's chains between pop and push, oldest first, if one of them is lent; free-running indices. */
	struct loan *loans; /* a power of two, at least num; NULL: nothing is ever lent */
	u32 loans_mask;
	u32 loans_head;
	u32 loans_tail;
	u64 loans_since; /* cycles, when the oldest became the oldest */
	bool waits;	 /* its worker looks for the end of loans */

	/* Written by the control thread too, and not read for a frame. */
	struct xn_ring_config config; /* what it was started with */
	const struct dirty_log *log;  /* NULL: nothing is logged */
	bool logs_frames;	      /* what is written into buffers is */
	bool logs_used; /* what is written into the ring is: of the device's part, which is the used ring ... */
	u64 log_used;	/* ... as if it lay here */
	u64 log_desc;	/* packed: where the descriptors lie; guest physical addresses, like that */
	int log_fd;	/* to be signalled when there is something in the log; -1: none */

	/* Receive: cycles, when a frame found no buffer, and how many the ring had taken then; 0: it has had some since. */
	u64 starved;
	u64 starved_after;

	struct xn_queue_stats stats XN_ALIGNED;
};

/* Latches the ring broken, tells the frontend through its err eventfd and the control thread through an event. */
void vring_break(struct virtqueue *q, enum xn_broken why);

/*
 * Interrupts the guest, when `caller` is flushed, if an index that it published asks for it, up to where `used` stood at
 * `until`. A full fence was put after vring_publish. Whether there is more, that the guest was not told of either.
 */
bool vring_notify(struct virtqueue *q, struct cursor until, struct caller *caller);

/*
 * Takes the pieces of a chain: at most `room`, their bytes added up in *total. Returns how many; -EMSGSIZE if there are
 * more, or too many descriptors; -EFAULT if it is found to have some of its bytes, or its table, in memory that is left out:
 * then it is to be handed back as it is; -EIO if the chain broke the ring. *chain is what push needs. Adds to *steps what it
 * took.
 */
int split_walk(struct virtqueue *q, struct cursor at, bool writable, struct piece *out, u32 room, u64 *total,
	       chain_t *chain, u32 *steps);
int packed_walk(struct virtqueue *q, struct cursor at, bool writable, struct piece *out, u32 room, u64 *total,
		chain_t *chain, u32 *steps);
/*
 * Where a device stands in a packed ring that it has left at any moment, from what is in the ring; `base` is only what the
 * frontend believes. Completes what was being published. False: the ring does not tell.
 */
bool packed_find(const struct virtqueue *q, struct cursor base, struct cursor *found);
/* An indirect table; it lies in guest memory and may cross regions. */
struct indirect {
	const u8 *table; /* NULL: not in one piece, or at an odd address; it is read a descriptor at a time */
	u64 addr;
	u32 entries;
};

/* 0, or -EIO: a table of no, partial or too many descriptors broke the ring. */
int vring_open_indirect(struct virtqueue *q, u64 addr, u32 len, struct indirect *in);
/* A snapshot of descriptor i, 16 bytes; 0, -EFAULT: in memory that is left out, or -EIO: outside of guest memory. */
int vring_read_indirect(struct virtqueue *q, const struct indirect *in, u32 i, void *desc, u32 *steps);
/* For both: translates one descriptor's range; a range that crosses regions gives a piece for each. */
int vring_add_pieces(struct virtqueue *q, u64 addr, u32 len, struct piece *out, u32 room, u32 *steps);
/* Breaks the ring; for a return statement. */
int vring_fail(struct virtqueue *q, enum xn_broken why);

static inline void cursor_advance(const struct virtqueue *q, struct cursor *c, u16 n, bool packed)
{
	c->pos = (u16)(c->pos + n);
	if (packed && c->pos >= q->num) {
		c->pos = (u16)(c->pos - q->num);
		c->wrap ^= 1;
	}
}

static inline bool cursor_is(struct cursor a, struct cursor b)
{
	return a.pos == b.pos && a.wrap == b.wrap;
}

/* From one place to a later one, less than a lap on. */
static inline u32 vring_distance(const struct virtqueue *q, struct cursor from, struct cursor to)
{
	if (!q->is_packed)
		return (u16)(to.pos - from.pos);
	return to.pos - from.pos + (to.wrap == from.wrap ? 0 : q->num);
}

/* ---- split ---- */

/* The index at which the device wants a kick, behind the used ring (2.7.10). */
static inline u16 *split_avail_event_at(const struct virtqueue *q)
{
	return (u16 *)&q->split.used->ring[q->num];
}

/* The index at which the driver wants an interrupt, behind the available ring. */
static inline u16 *split_used_event_at(const struct virtqueue *q)
{
	return &q->split.avail->ring[q->num];
}

/* Reads the guest's index; false if it is nonsense: too far ahead, or behind what was taken already. */
static inline bool split_refresh(struct virtqueue *q, u16 taken)
{
	/* Acquire: the ring's entries and descriptors are read after the index that publishes them. */
	u16 idx = g_load16_acquire(&q->split.avail->idx);

	if (unlikely((u16)(idx - taken) > q->num - (u16)(taken - q->next.pos))) {
		vring_break(q, XN_BROKEN_AVAIL_JUMP);
		return false;
	}
	q->avail_idx = idx;
	return true;
}

/* The head of the chain at a cursor; not yet checked against the table. */
static inline u16 split_head(const struct virtqueue *q, u16 pos)
{
	return g_load16(&q->split.avail->ring[pos & (q->num - 1)]);
}

/* ---- packed ---- */

/* Flags that make a descriptor available, or used, in the lap with this wrap counter (2.8.1). */
static inline u16 packed_avail_flags(u16 wrap)
{
	return wrap ? 1u << VRING_PACKED_DESC_F_AVAIL : 1u << VRING_PACKED_DESC_F_USED;
}

static inline u16 packed_used_flags(u16 wrap)
{
	return wrap ? 1u << VRING_PACKED_DESC_F_AVAIL | 1u << VRING_PACKED_DESC_F_USED : 0;
}

static inline bool packed_is_available(u16 flags, u16 wrap)
{
	const u16 both = 1u << VRING_PACKED_DESC_F_AVAIL | 1u << VRING_PACKED_DESC_F_USED;

	return (flags & both) == packed_avail_flags(wrap);
}

/* ---- both ---- */

/* Marks what was written into the device's part, so many bytes from its beginning. */
static inline void vring_log_device(const struct virtqueue *q, u64 offset, u64 len)
{
	if (q->logs_used)
		dirty_mark(q->log, q->log_used + offset, len);
}

/* The used elements, or packed descriptors, from one place to a later one. */
static inline void vring_log_elements(const struct virtqueue *q, struct cursor from, struct cursor to, bool packed)
{
	const u64 base = packed ? q->log_desc : q->log_used + offsetof(struct vring_used, ring);
	const u64 size = packed ? sizeof(struct vring_packed_desc) : sizeof(struct vring_used_elem);
	u32 n = vring_distance(q, from, to), first = packed ? from.pos : from.pos & (q->num - 1);
	u32 before = min_u32(n, q->num - first);

	if (!q->logs_used)
		return;
	dirty_mark(q->log, base + first * size, before * size);
	dirty_mark(q->log, base, (n - before) * size);
}

/* All that a device may write of it. */
void vring_log_all(const struct virtqueue *q);
/* Bytes of the device's part. */
u64 vring_device_size(const struct virtqueue *q);

static always_inline bool vring_peek(struct virtqueue *q, struct cursor at, bool packed)
{
	if (unlikely(q->broken))
		return false;
	if (packed) {
		/* Acquire: the rest of the descriptor is read after the flags that hand it over. */
		return packed_is_available(g_load16_acquire(&q->packed.desc[at.pos].flags), at.wrap);
	}
	if (at.pos != q->avail_idx)
		return true;
	return split_refresh(q, at.pos) && at.pos != q->avail_idx;
}

/*
 * A chain of one direct descriptor in one region, which nearly all are; 0: it is another, look again, as if for the
 * first time. One snapshot of 16 bytes: the guest may rewrite the descriptor at any moment.
 */
static always_inline int pop_single(struct virtqueue *q, struct cursor at, bool writable, struct piece *out, u64 *total,
				    chain_t *chain, bool packed)
{
	const u16 special = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE;
	u16 id = packed ? 0 : split_head(q, at.pos), flags;
	const u8 *desc;
	u64 addr, rest;

	if (!packed && unlikely(id >= q->num))
		return 0;
	desc = packed ? (const u8 *)&q->packed.desc[at.pos] : (const u8 *)&q->split.desc[id];
	addr = g_load64(desc);
	rest = g_load64(desc + 8);
	flags = (u16)(rest >> (packed ? 48 : 32));
	if (packed)
		id = (u16)(rest >> 32);
	if (unlikely((flags & special) != (writable ? VRING_DESC_F_WRITE : 0)))
		return 0;
	if (packed && unlikely(id >= q->num || !packed_is_available(flags, at.wrap)))
		return 0;
	u64 len = (u32)rest;
	u8 *ptr = mem_at(q->mem, &q->hint, addr, &len);

	if (unlikely(!ptr || len != (u32)rest || !len))
		return 0;
	*out = (struct piece){ptr, (u32)len};
	*total = len;
	*chain = chain_of(id, 1);
	return 1;
}

/* Needs a peek that said yes. The cursor moves unless the ring broke. *steps: of chains that are no single descriptor. */
static always_inline int vring_pop(struct virtqueue *q, struct cursor *at, bool writable, struct piece *out, u32 room,
				   u64 *total, chain_t *chain, u32 *steps, bool packed)
{
	if (likely(pop_single(q, *at, writable, out, total, chain, packed))) {
		cursor_advance(q, at, 1, packed);
		return 1;
	}
	int n = packed ? packed_walk(q, *at, writable, out, room, total, chain, steps)
		       : split_walk(q, *at, writable, out, room, total, chain, steps);

	if (likely(n != -EIO))
		cursor_advance(q, at, packed ? chain_descs(*chain) : 1, packed);
	return n;
}

/*
 * Chains being handed back. The guest sees none of them before vring_publish, and `used` of the ring stands still; kept
 * apart from the ring so that a loop has it in registers.
 */
struct pushing {
	struct cursor at;
	u16 first_pos; /* packed: whose flags make them all visible, so they are stored last */
	u16 first_flags;
	bool any;
	bool several; /* packed: some element stands for more descriptors than its own */
};

static always_inline struct pushing vring_begin(const struct virtqueue *q)
{
	return (struct pushing){.at = q->used};
}

static always_inline void push_packed(const struct virtqueue *q, struct pushing *p, chain_t chain, u32 written)
{
	struct vring_packed_desc *d = &q->packed.desc[p->at.pos];
	/* The WRITE flag says that the length means something (2.8.4); so it does here even where it is 0. */
	u16 flags = packed_used_flags(p->at.wrap) | (written ? VRING_DESC_F_WRITE : 0);

	g_store32(&d->len, written);
	g_store16(&d->id, chain_id(chain));
	p->several |= chain_descs(chain) > 1;
	if (p->any) {
		/* Release: length and id are visible before the flags. */
		g_store16_release(&d->flags, flags);
		return;
	}
	p->first_pos = p->at.pos;
	p->first_flags = flags;
}

static always_inline void push_split(const struct virtqueue *q, const struct pushing *p, chain_t chain, u32 written)
{
	const struct vring_used_elem element = {.id = chain_id(chain), .len = written};

	g_copy_to(&q->split.used->ring[p->at.pos & (q->num - 1)], &element, sizeof(element));
}

static always_inline void vring_push(const struct virtqueue *q, struct pushing *p, chain_t chain, u32 written,
				     bool packed)
{
	if (packed)
		push_packed(q, p, chain, written);
	else
		push_split(q, p, chain, written);
	p->any = true;
	cursor_advance(q, &p->at, packed ? chain_descs(chain) : 1, packed);
}

/*
 * All chains up to the cursor `after`, of which `last` is the last, with nothing written into any: with IN_ORDER one
 * element stands for all of them (2.7.9, 2.8.9).
 */
static always_inline void vring_push_until(const struct virtqueue *q, struct pushing *p, struct cursor after,
					   chain_t last, bool packed)
{
	if (packed)
		push_packed(q, p, last, 0);
	else
		push_split(q, p, last, 0);
	p->any = p->several = true;
	p->at = after;
}

/*
 * A device's event suppression is its own, and while it wants no kick its index means nothing to the driver (2.8.10): so it
 * says where `used` stands to whoever finds the ring after us. It is written where the flags of the descriptors do not
 * tell, and once a lap, so that those between it and `used` are all of one descriptor; see packed_find.
 */
static always_inline void vring_leave_mark(const struct virtqueue *q, bool logged)
{
	if (q->armed)
		return;
	g_store16(&q->packed.device->off_wrap, off_wrap_of(q->used));
	if (logged)
		vring_log_device(q, 0, sizeof(*q->packed.device));
}

/* False: nothing was pushed. */
static always_inline bool vring_publish(struct virtqueue *q, const struct pushing *p, bool packed, bool logged)
{
	if (!p->any)
		return false;
	bool unclear = packed && (p->several || p->at.wrap != q->used.wrap);

	if (packed) {
		g_store16_release(&q->packed.desc[p->first_pos].flags, p->first_flags);
		if (logged)
			vring_log_elements(q, q->used, p->at, true);
	} else {
		if (logged)
			vring_log_elements(q, q->used, p->at, false);
		/* Release: the buffers and used elements are visible before the index that announces them. */
		g_store16_release(&q->split.used->idx, p->at.pos);
		if (logged)
			vring_log_device(q, offsetof(struct vring_used, idx), sizeof(u16));
	}
	q->unchecked += vring_distance(q, q->used, p->at);
	q->used = p->at;
	if (packed && unclear)
		vring_leave_mark(q, logged);
	if (logged)
		events_call(q->events, q->log_fd);
	return true;
}

/*
 * Has the descriptors of the next n chains, and where `elements` will be handed back, on their way into the cache. Both were
 * last touched by the guest; in a split ring, descriptors lie in no order that the hardware could guess.
 */
static always_inline void vring_prefetch(struct virtqueue *q, u32 n, u32 elements, bool packed)
{
	if (packed) {
		const u32 line = XN_CACHELINE / sizeof(struct vring_packed_desc);

		/* They are handed back where they were taken. */
		for (u32 i = 0; i < elements; i += line)
			prefetch_write(&q->packed.desc[q->next.pos + i < q->num ? q->next.pos + i : i]);
		return;
	}
	const u32 line = XN_CACHELINE / sizeof(struct vring_used_elem);
	u32 known = min_u32((u16)(q->avail_idx - q->next.pos), n);

	for (u32 i = 0; i < known; i++) {
		u16 head = split_head(q, (u16)(q->next.pos + i));

		if (likely(head < q->num))
			prefetch(&q->split.desc[head]);
	}
	for (u32 i = 0; i < elements; i += line)
		prefetch_write(&q->split.used->ring[(q->used.pos + i) & (q->num - 1)]);
}

/* How many are available shows in the descriptors alone: so a packed ring is looked at a little way ahead, line by line. */
static always_inline void packed_prefetch_ahead(const struct virtqueue *q, u32 pos)
{
	const u32 line = XN_CACHELINE / sizeof(struct vring_packed_desc);

	if (pos % line == 0)
		prefetch(&q->packed.desc[pos + 2 * line < q->num ? pos + 2 * line : 0]);
}

/* Stops asking for kicks. Split with event index: a stale index in the past does that by itself. */
static inline void vring_disarm(struct virtqueue *q)
{
	if (q->is_packed) {
		g_store16(&q->packed.device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
		q->armed = false;
		vring_log_device(q, 0, sizeof(*q->packed.device));
	} else if (!q->event_idx) {
		g_store16(&q->split.used->flags, VRING_USED_F_NO_NOTIFY);
		vring_log_device(q, 0, sizeof(u16));
	}
}

/* Asks for a kick at the chain at the cursor. True if it arrived meanwhile: the caller goes on instead of sleeping. */
static inline bool vring_arm(struct virtqueue *q, struct cursor at)
{
	if (q->is_packed) {
		/* Ahead of `next` it would be no mark any more: then every chain may bring a kick. */
		bool by_index = q->event_idx && at.pos == q->next.pos && at.wrap == q->next.wrap;
		u16 flags = by_index ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE;

		g_store16(&q->packed.device->off_wrap, off_wrap_of(by_index ? at : q->used));
		q->armed = by_index;
		g_store16_release(&q->packed.device->flags, flags);
		vring_log_device(q, 0, sizeof(*q->packed.device));
	} else if (q->event_idx) {
		g_store16(split_avail_event_at(q), at.pos);
		vring_log_device(q, vring_device_size(q) - sizeof(u16), sizeof(u16));
	} else {
		g_store16(&q->split.used->flags, 0);
		vring_log_device(q, 0, sizeof(u16));
	}
	/* The guest makes a chain available and then reads what we published; we publish and then look at the ring. */
	full_fence();
	return vring_peek(q, at, q->is_packed);
}

/* Cycles, since when a receive ring has had no buffer for what came; 0: it has. */
static inline u64 vring_starved(const struct virtqueue *q)
{
	u64 since = __atomic_load_n(&q->starved, __ATOMIC_RELAXED);

	return since && q->stats.packets == __atomic_load_n(&q->starved_after, __ATOMIC_RELAXED) ? since : 0;
}

static inline void vring_lock(struct virtqueue *q)
{
	if (q->shared)
		spin_lock(&q->lock);
}

static inline void vring_unlock(struct virtqueue *q)
{
	if (q->shared)
		spin_unlock(&q->lock);
}

#endif
