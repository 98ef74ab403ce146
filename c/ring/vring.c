#include "vring.h"

void vring_break(struct virtqueue *q, enum xn_broken why)
{
	if (q->broken)
		return;
	/* Zeroes in place of lost memory make no sense as a ring: that is not the guest's fault. */
	if (__atomic_load_n(&q->alarms->lost, __ATOMIC_RELAXED))
		why = XN_BROKEN_MEMORY;
	q->broken = (u8)why;
	count(&q->stats.breaks, 1);
	/* Release: whoever finds it broken finds the reason. */
	__atomic_store_n(&q->has_broken, true, __ATOMIC_RELEASE);
	events_call(q->events, q->err_fd);
	events_tell(q->events, why == XN_BROKEN_MEMORY ? XN_EVENT_MEMORY : XN_EVENT_BROKEN);
}

u64 vring_device_size(const struct virtqueue *q)
{
	/* With event index, the used ring has one more entry of two bytes (2.7.8). */
	const u64 event = q->event_idx ? sizeof(u16) : 0;

	if (q->is_packed)
		return sizeof(struct vring_packed_desc_event);
	return sizeof(struct vring_used) + q->num * sizeof(struct vring_used_elem) + event;
}

void vring_log_all(const struct virtqueue *q)
{
	vring_log_device(q, 0, vring_device_size(q));
	if (q->is_packed && q->logs_used)
		dirty_mark(q->log, q->log_desc, q->num * sizeof(struct vring_packed_desc));
}

int vring_fail(struct virtqueue *q, enum xn_broken why)
{
	vring_break(q, why);
	return -EIO;
}

/* What is known and not mapped is no fault of the guest's; what lies in no region breaks the ring. */
static int find_no_memory(struct virtqueue *q, u64 addr, u32 *steps)
{
	*steps += 1 + q->mem->all / 8;
	return mem_is_left_out(q->mem, addr) ? -EFAULT : vring_fail(q, XN_BROKEN_ADDR);
}

int vring_open_indirect(struct virtqueue *q, u64 addr, u32 len, struct indirect *in)
{
	const u32 size = sizeof(struct vring_desc);
	u64 whole = len;

	*in = (struct indirect){.addr = addr, .entries = len / size};
	if (unlikely(!len || len % size || in->entries > 16 * q->num || in->entries > 65536))
		return vring_fail(q, XN_BROKEN_INDIRECT_LEN);
	in->table = mem_at(q->mem, &q->hint, addr, &whole);
	if (whole < len || (uintptr_t)in->table % sizeof(u64))
		in->table = NULL;
	return 0;
}

int vring_read_indirect(struct virtqueue *q, const struct indirect *in, u32 i, void *desc, u32 *steps)
{
	const u32 size = sizeof(struct vring_desc);

	*steps += 1;
	if (likely(in->table)) {
		g_load_desc(desc, in->table + (u64)i * size);
		return 0;
	}
	u64 addr = in->addr + (u64)i * size;

	*steps += STEPS_UNALIGNED;
	return mem_read(q->mem, &addr, desc, size) ? 0 : find_no_memory(q, addr, steps);
}

int vring_add_pieces(struct virtqueue *q, u64 addr, u32 len, struct piece *out, u32 room, u32 *steps)
{
	u32 n = 0;

	while (len) {
		u64 part = len;
		u32 hint = q->hint;
		u8 *ptr = mem_at(q->mem, &q->hint, addr, &part);

		if (unlikely(!ptr))
			return find_no_memory(q, addr, steps);
		/* It had to be looked for. */
		if (hint != q->hint)
			*steps += 1 + q->mem->n / 8;
		if (unlikely(n == room))
			return -EMSGSIZE;
		out[n++] = (struct piece){ptr, (u32)part};
		addr += part;
		len -= (u32)part;
		/* Past the last address there is nothing; an addr of 0 would be other memory than the guest meant. */
		if (unlikely(!addr && len))
			return vring_fail(q, XN_BROKEN_ADDR);
	}
	return (int)n;
}

static bool split_wants_call(const struct virtqueue *q, struct cursor old, struct cursor until)
{
	if (!q->event_idx)
		return !(g_load16(&q->split.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
	return !q->signalled_valid || vring_need_event(g_load16(split_used_event_at(q)), until.pos, old.pos);
}

static bool packed_wants_call(const struct virtqueue *q, struct cursor old, struct cursor until)
{
	u16 flags = g_load16(&q->packed.driver->flags);

	if (flags == VRING_PACKED_EVENT_FLAG_DISABLE)
		return false;
	/* What we cannot make sense of (a reserved value, DESC without the feature) costs an interrupt, no hang. */
	if (flags != VRING_PACKED_EVENT_FLAG_DESC || !q->event_idx || !q->signalled_valid)
		return true;
	u16 off_wrap = g_load16(&q->packed.driver->off_wrap);
	u32 event = cursor_of(off_wrap).pos;
	u32 new = until.pos, from = old.pos;

	/* On one line with `until` as its end: what lies in the lap before is below zero, modulo 2^16. */
	if (cursor_of(off_wrap).wrap != until.wrap)
		event -= q->num;
	if (old.wrap != until.wrap)
		from -= q->num;
	return vring_need_event((u16)event, (u16) new, (u16)from);
}

bool vring_notify(struct virtqueue *q, struct cursor until, struct caller *caller)
{
	struct cursor old = q->signalled;

	/* Past a lap, where `used` stood and where it stands no longer tell how far it went. */
	if (q->unchecked > q->num) {
		q->signalled_valid = false;
		until = q->used;
	}
	if (!q->signalled_valid || !cursor_is(old, until)) {
		bool wanted = q->is_packed ? packed_wants_call(q, old, until) : split_wants_call(q, old, until);

		if (wanted)
			until = q->used;
		if (wanted && q->call_fd >= 0) {
			count(&q->stats.calls, 1);
			caller_add(caller, q->call_fd);
		} else {
			count(&q->stats.calls_saved, 1);
		}
	}
	q->signalled = until;
	q->signalled_valid = true;
	q->unchecked = vring_distance(q, until, q->used);
	return !cursor_is(until, q->used);
}
