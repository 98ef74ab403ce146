/*
 * The rings of a guest: what is started, stopped and enabled, and what follows from which of them are up.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "guest.h"

void guest_settle_rings(struct guest *g)
{
	u32 workers = g->port.bridge->workers.n;
	bool in_line = true;

	g->ready_n = 0;
	for (u32 i = 0; i < g->pairs; i++) {
		const struct virtqueue *rx = &g->rings[2 * i];

		if (!rx->started || !rx->enabled)
			continue;
		in_line &= i == g->ready_n;
		g->ready[g->ready_n++] = i;
	}
	/* With as many pairs as workers (or a multiple), frames of a worker's queues only go to rings of that worker. */
	bool shared = workers > 1 && (!in_line || g->ready_n % workers);

	g->choice_step = shared ? 1 : workers;
	g->choices = g->ready_n / g->choice_step;
	for (u32 i = 0; i < g->pairs; i++)
		g->rings[2 * i].shared = shared;
	g->port.ready = g->ready_n;
	fdb_set_here(g->port.bridge->fdb, g->port.id, g->ready_n, monotonic_s());
}

void guest_stop_ring(struct virtqueue *q)
{
	if (q->source.worker)
		worker_remove_source(&q->source);
	workers_forget_ring(&q->port->bridge->workers, q);
	q->dirty = 0;
	q->waits = false;
	q->started = q->logs_frames = q->logs_used = false;
	q->log = NULL;
	guest_drop_waiting(q);
	free(q->loans);
	q->loans = NULL;
}

/* The frontend's addresses were checked; a region may begin at an odd place of its file. */
static bool is_aligned(const void *desc, const void *avail, u32 avail_align, const void *used)
{
	return !((uintptr_t)desc % 16 || (uintptr_t)avail % avail_align || (uintptr_t)used % sizeof(u32));
}

bool guest_translate_ring(struct virtqueue *q, const struct mem *m)
{
	const struct xn_ring_config *c = &q->config;
	u64 num = c->num, event = q->event_idx ? sizeof(u16) : 0, device = vring_device_size(q);

	q->mem = m;
	q->hint = 0;
	if (q->is_packed) {
		q->packed.desc = mem_user(m, c->desc_addr, num * sizeof(struct vring_packed_desc));
		q->packed.driver = mem_user(m, c->avail_addr, sizeof(struct vring_packed_desc_event));
		q->packed.device = mem_user(m, c->used_addr, device);
		return q->packed.desc && q->packed.driver && q->packed.device &&
		       is_aligned(q->packed.desc, q->packed.driver, sizeof(u32), q->packed.device);
	}
	/* With event index, it has one more entry (2.7.6). */
	q->split.desc = mem_user(m, c->desc_addr, num * sizeof(struct vring_desc));
	q->split.avail = mem_user(m, c->avail_addr, sizeof(struct vring_avail) + num * sizeof(u16) + event);
	q->split.used = mem_user(m, c->used_addr, device);
	return q->split.desc && q->split.avail && q->split.used &&
	       is_aligned(q->split.desc, q->split.avail, sizeof(u16), q->split.used);
}

static void layout_ring(struct virtqueue *q, u64 features)
{
	q->is_packed = features >> VIRTIO_F_RING_PACKED & 1;
	q->event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1;
	q->indirect = features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	q->mergeable = features >> VIRTIO_NET_F_MRG_RXBUF & 1;
	q->in_order = features >> VIRTIO_F_IN_ORDER & 1;
	q->hdr_len = q->mergeable || features >> VIRTIO_F_VERSION_1 & 1 ? sizeof(struct virtio_net_hdr_mrg_rxbuf)
									: sizeof(struct virtio_net_hdr);
}

void guest_close_ring(struct virtqueue *q)
{
	if (q->started)
		guest_stop_ring(q);
	guest_close_fd(&q->kick_fd);
	guest_close_fd(&q->call_fd);
	guest_close_fd(&q->err_fd);
}

static struct virtqueue *ring_of(struct xn_bridge *b, u32 port, u32 ring)
{
	struct guest *g = guest_at(b, port);

	return g && ring < 2 * g->pairs ? &g->rings[ring] : NULL;
}

/* Room for every chain of the ring to be lent, where any may be. */
static int make_loans(struct virtqueue *q)
{
	u32 room = 1;

	q->loans_head = q->loans_tail = 0;
	if (q->port->bridge->arena.zerocopy == XN_ZEROCOPY_OFF || q->port->check_source)
		return 0;
	while (room < q->num)
		room *= 2;
	q->loans = calloc(room, sizeof(*q->loans));
	q->loans_mask = room - 1;
	return q->loans ? 0 : -ENOMEM;
}

/*
 * Where a split ring goes on: where its frontend says, which may be ahead of the used index by chains that somebody else has
 * taken, and hands back. But one whose backend was killed says what it has: 0 (DPDK, user-mode Linux), or the available index
 * (cloud-hypervisor; QEMU has the used one). Unless it was us who stopped there, these two mean nothing, and what is not
 * between the indices cannot be: then what was taken was also given back, and the ring goes on at its used index.
 */
static u16 split_find(const struct virtqueue *q, u16 told, u16 used)
{
	u16 avail = g_load16(&q->split.avail->idx);

	if (told == q->next.pos && used == q->used.pos)
		return told;
	if (q->in_order || !told || (u16)(avail - used) > q->num || (u16)(told - used) >= (u16)(avail - used))
		return used;
	return told;
}

int xn_ring_start(struct xn_bridge *b, uint32_t port, uint32_t ring, const struct xn_ring_config *config)
{
	struct virtqueue *q = ring_of(b, port, ring);
	int r = 0;

	if (!q)
		return -ENOENT;
	bool packed = guest_of(q->port)->features >> VIRTIO_F_RING_PACKED & 1;
	u32 num = config->num;

	if (!num || num > XN_MAX_RING || config->desc_addr % 16 || config->used_addr % 4)
		return -EINVAL;
	if (packed ? (config->base & 0x7fff) >= num || config->avail_addr % 4
		   : num & (num - 1) || config->base > UINT16_MAX || config->avail_addr % 2)
		return -EINVAL;
	guest_park(q->port);
	if (q->started)
		guest_stop_ring(q);
	q->config = *config;
	q->num = config->num;
	layout_ring(q, guest_of(q->port)->features);
	r = guest_translate_ring(q, guest_of(q->port)->mem) ? 0 : -EFAULT;
	if (!r && config->logs && guest_of(q->port)->log &&
	    !dirty_covers(guest_of(q->port)->log, config->log_addr, vring_device_size(q)))
		r = -ENOSPC;
	if (!r)
		r = guest_keep_fd(&q->kick_fd, config->kick_fd);
	if (!r)
		r = guest_keep_fd(&q->call_fd, config->call_fd);
	if (!r)
		r = guest_keep_fd(&q->err_fd, config->err_fd);
	if (!r && ring % 2 == XN_TX)
		r = make_loans(q);
	if (r)
		goto out;
	q->flood_next = 0;
	q->steps_left = POLL_STEPS;
	/*
	 * A packed ring tells itself where it stands, and better than any frontend: QEMU keeps no index of its own, and says
	 * after our death where the ring began. What was taken was also given back: both its places are the same.
	 */
	struct cursor told = packed ? cursor_of((u16)config->base) : (struct cursor){(u16)config->base, 0};
	struct cursor found = told, used;
	bool tells = true;

	if (packed) {
		tells = packed_find(q, told, &found);
		used = found;
	} else {
		used = (struct cursor){g_load16(&q->split.used->idx), 0};
		found.pos = split_find(q, told.pos, used.pos);
	}
	q->next = found;
	q->used = used;
	q->avail_idx = q->next.pos;
	q->unchecked = 0;
	q->signalled_valid = false;
	q->broken = XN_RING_OK;
	q->started = true;
	vring_disarm(q);
	if (packed)
		vring_leave_mark(q, false);
	if (!tells)
		vring_break(q, XN_BROKEN_POSITION);
	if (ring % 2 == XN_TX) {
		q->source = (struct source){.queue = ring,
					    .fd = q->kick_fd,
					    .spins = true,
					    .kicks = &q->stats.kicks,
					    .bytes = {&q->stats.bytes, &q[-1].stats.bytes}};
	} else {
		/* Buffers are waited for only by frames that found none. An index just passed asks for one kick in 65536. */
		if (!packed && q->event_idx)
			g_store16(split_avail_event_at(q), (u16)(q->next.pos - 1));
		q->source = (struct source){.ops = &receive_source,
					    .queue = ring,
					    .fd = q->kick_fd,
					    .dead = true,
					    .kicks = &q->stats.kicks};
	}
	/* After what was written until here. */
	guest_settle_log(guest_of(q->port));
	r = worker_add_source(worker_of(&b->workers, ring / 2), &q->source, port);
	if (r)
		guest_stop_ring(q);
	/* What our predecessor handed back it may have had no time to tell of. */
	else if (!cursor_is(found, told))
		events_call(&b->events, q->call_fd);
out:
	guest_settle_rings(guest_of(q->port));
	bridge_settle(b);
	workers_resume(&b->workers);
	return r;
}

/* As SET_VRING_BASE has it. Packed: 15 bits of index and the wrap counter, for available below, for used above. */
static u32 ring_base(const struct virtqueue *q)
{
	return q->is_packed ? off_wrap_of(q->next) * 0x10001u : q->next.pos;
}

int xn_ring_stop(struct xn_bridge *b, uint32_t port, uint32_t ring, uint32_t *base)
{
	struct virtqueue *q = ring_of(b, port, ring);

	if (!q)
		return -ENOENT;
	guest_park(q->port);
	if (q->started) {
		guest_stop_ring(q);
		guest_settle_rings(guest_of(q->port));
	}
	bridge_settle(b);
	guest_close_ring(q);
	workers_resume(&b->workers);
	*base = ring_base(q);
	return 0;
}

int xn_ring_enable(struct xn_bridge *b, uint32_t port, uint32_t ring, int enabled)
{
	struct virtqueue *q = ring_of(b, port, ring);

	if (!q)
		return -ENOENT;
	if (q->enabled == !!enabled)
		return 0;
	workers_park(&b->workers);
	q->enabled = enabled;
	if (!enabled)
		guest_drop_waiting(q);
	guest_settle_rings(guest_of(q->port));
	workers_resume(&b->workers);
	return 0;
}

static int set_ring_fd(struct xn_bridge *b, struct virtqueue *q, int *slot, int fd)
{
	if (!q)
		return -ENOENT;
	workers_park(&b->workers);
	int r = guest_keep_fd(slot, fd);

	workers_resume(&b->workers);
	return r;
}

int xn_ring_set_call(struct xn_bridge *b, uint32_t port, uint32_t ring, int fd)
{
	struct virtqueue *q = ring_of(b, port, ring);
	int r = set_ring_fd(b, q, q ? &q->call_fd : NULL, fd);

	/* An interrupt sent to the old fd may be lost with it: one to the new one makes up for it. */
	if (!r && q->started)
		events_call(&b->events, q->call_fd);
	return r;
}

int xn_ring_set_err(struct xn_bridge *b, uint32_t port, uint32_t ring, int fd)
{
	struct virtqueue *q = ring_of(b, port, ring);

	return set_ring_fd(b, q, q ? &q->err_fd : NULL, fd);
}

int xn_ring_state(struct xn_bridge *b, uint32_t port, uint32_t ring, struct xn_ring_state *out)
{
	const struct virtqueue *q = ring_of(b, port, ring);

	if (!q)
		return -ENOENT;
	*out = (struct xn_ring_state){
		.worker = worker_of(&b->workers, ring / 2)->id, .enabled = q->enabled, .broken = q->broken};
	out->last_avail = __atomic_load_n(&q->next.pos, __ATOMIC_RELAXED);
	out->waiting = __atomic_load_n(&q->backlog.n, __ATOMIC_RELAXED);
	if (!q->started)
		return 0;
	out->started = 1;
	out->packed = q->is_packed;
	out->num = q->num;
	out->used_idx = __atomic_load_n(&q->used.pos, __ATOMIC_RELAXED);
	if (q->is_packed) {
		const u16 offset = (1u << VRING_PACKED_EVENT_F_WRAP_CTR) - 1;

		/* The guest publishes no index: what it has made available shows in the descriptors alone. */
		out->avail_idx = out->last_avail;
		out->avail_event = g_load16(&q->packed.device->off_wrap) & offset;
		out->used_event = g_load16(&q->packed.driver->off_wrap) & offset;
		return 0;
	}
	out->avail_idx = g_load16(&q->split.avail->idx);
	if (q->event_idx) {
		out->avail_event = g_load16(split_avail_event_at(q));
		out->used_event = g_load16(split_used_event_at(q));
	}
	return 0;
}

int xn_bridge_broken(struct xn_bridge *b, struct xn_broken_ring *out)
{
	int n = 0;

	for (u32 id = 0; id < b->ports_n; id++) {
		const struct guest *g = guest_at(b, id);

		for (u32 ring = 0; g && ring < 2 * g->pairs; ring++) {
			struct virtqueue *q = &g->rings[ring];

			/* Acquire: the reason was stored before. */
			if (!__atomic_load_n(&q->has_broken, __ATOMIC_RELAXED) ||
			    !__atomic_exchange_n(&q->has_broken, false, __ATOMIC_ACQUIRE))
				continue;
			out[n++] = (struct xn_broken_ring){
				.port = id, .ring = ring, .broken = __atomic_load_n(&q->broken, __ATOMIC_RELAXED)};
		}
	}
	return n;
}
