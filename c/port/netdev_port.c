/* A netdev port's control: its sockets, and what follows from which of them are open. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "netdev.h"
#include "xdp/sockets.h"

/* While parked: recomputes what depends on which sockets are open. */
static void settle(struct netdev *d)
{
	u32 workers = d->port.bridge->workers.n;
	bool in_line = true;

	d->ready_n = 0;
	for (u32 i = 0; i < d->queues; i++) {
		if (!d->queue[i].xsk)
			continue;
		in_line &= i == d->ready_n;
		d->ready[d->ready_n++] = i;
	}
	bool shared = workers > 1 && (!in_line || d->ready_n % workers);

	for (u32 i = 0; i < d->queues; i++)
		if (d->queue[i].xsk) {
			d->queue[i].xsk->users = shared					? XSK_OF_SEVERAL
						 : workers > 1 && d->queue[i].xsk->umem ? XSK_LOOKED_INTO
											: XSK_OF_ONE;
		}
	d->port.ready = d->ready_n;
}

static struct netdev_queue *queue_of(struct xn_bridge *b, u32 port, u32 queue)
{
	struct netdev *d = netdev_at(b, port);

	return d && queue < d->queues ? &d->queue[queue] : NULL;
}

/* While parked. */
static void close_queue(struct netdev *d, struct netdev_queue *nq)
{
	struct xsk *x = nq->xsk;

	if (!x)
		return;
	/* The last chance for what was submitted in the turn before. */
	if (x->state != XSK_IDLE)
		xsk_kick(x);
	/* A socket whose interface is gone has no statistics any more. */
	(void)xsk_statistics(x, &nq->past);
	worker_remove_source(&x->source);
	workers_forget_xsk(&d->port.bridge->workers, x);
	xsk_close(x);
	nq->xsk = NULL;
	settle(d);
}

static void drop_group(struct netdev *d)
{
	if (d->group_fd < 0)
		return;
	worker_remove_source(&d->group);
	close(d->group_fd);
	d->group_fd = -1;
}

static const struct xn_queue_stats *stats(const struct port *p, u32 queue, enum xn_direction direction)
{
	const struct netdev *d = netdev_of(p);

	if (queue >= d->queues)
		return NULL;
	return direction == XN_RX ? &d->queue[queue].rx : &d->queue[queue].tx;
}

static void end_loans(struct port *p, u32 queue)
{
	struct netdev *d = netdev_of(p);

	events_tell(&p->bridge->events, XN_EVENT_UMEM);
	close_queue(d, &d->queue[queue]);
	d->queue[queue].lost = true;
}

static void park(struct port *p)
{
	workers_park(&p->bridge->workers);
}

static void release(struct port *p)
{
	struct netdev *d = netdev_of(p);

	drop_group(d);
	for (u32 i = 0; i < d->queues; i++)
		close_queue(d, &d->queue[i]);
	if (d->arena == &d->own)
		arena_release(&d->own);
	free(d->queue);
	free(d);
}

static const struct port_verbs verbs = {.deliver = netdev_deliver,
					.room = netdev_room,
					.stats = stats,
					.end_loans = end_loans,
					.park = park,
					.release = release};

/* Whether the bridge's arena has frames for so many queues more than its ports may open. */
static bool has_room(const struct xn_bridge *b, u32 queues)
{
	for (u32 id = 0; id < b->ports_n; id++) {
		const struct netdev *d = netdev_at(b, id);

		if (d && d->arena == &b->arena)
			queues += d->queues;
	}
	return queues <= b->arena.sets;
}

int xn_port_add_netdev(struct xn_bridge *b, uint32_t queues)
{
	if (!queues || queues > XN_MAX_NETDEV_QUEUES)
		return -EINVAL;
	struct netdev_queue *queue = aligned_alloc(XN_CACHELINE, queues * sizeof(*queue));
	struct netdev *d = calloc(1, sizeof(*d));

	if (!d || !queue) {
		free(queue);
		free(d);
		return -ENOMEM;
	}
	memset(queue, 0, queues * sizeof(*queue));
	/* What it does with a checksum it does as the frame is copied. */
	d->port = (struct port){.verbs = &verbs, .kind = PORT_NETDEV, .wire = true, .takes = NEED_CSUM};
	d->queues = queues;
	d->queue = queue;
	d->group_fd = -1;
	d->arena = has_room(b, queues) ? &b->arena : &d->own;
	int r = d->arena == &d->own ? arena_init(&d->own, queues, b->config.frames_per_queue, XN_ZEROCOPY_OFF) : 0;

	if (r < 0) {
		free(queue);
		free(d);
		return r;
	}
	workers_park(&b->workers);
	int id = bridge_add_port(b, &d->port);

	if (id < 0)
		release(&d->port);
	workers_resume(&b->workers);
	return id;
}

int xn_netdev_add_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	u64 value = station_of(mac);

	if (!netdev_at(b, port))
		return -ENOENT;
	int r = value ? fdb_set_static(b->fdb, value, port) : -EINVAL;

	if (!r)
		events_tell(&b->events, XN_EVENT_FDB);
	return r;
}

int xn_netdev_remove_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	if (!netdev_at(b, port) || !fdb_clear_static(b->fdb, station_of(mac), port))
		return -ENOENT;
	events_tell(&b->events, XN_EVENT_FDB);
	return 0;
}

int xn_netdev_prepare(struct xn_bridge *b, uint32_t port, uint32_t max_frame, uint32_t zerocopy, uint32_t flags)
{
	const struct netdev *d = netdev_at(b, port);

	if (!d)
		return -ENOENT;
	if (zerocopy > XN_ZEROCOPY_ON)
		return -EINVAL;
	int r = socket_prepare(d->arena, max_frame, zerocopy, flags);

	if (r == -EFAULT)
		events_tell(&b->events, XN_EVENT_UMEM);
	return r;
}

int xn_netdev_open_queue(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t ifindex, uint32_t max_frame,
			 uint32_t zerocopy, uint32_t flags)
{
	struct netdev_queue *nq = queue_of(b, port, queue);
	struct netdev *d = netdev_at(b, port);
	struct xsk *x;

	if (!nq)
		return -ENOENT;
	if (zerocopy > XN_ZEROCOPY_ON)
		return -EINVAL;
	if (nq->xsk)
		return -EALREADY;
	struct umem u;
	int r = socket_open(&u, d->arena, max_frame, zerocopy, flags);

	if (!r)
		r = xsk_open(&x, d->arena, &u, ifindex, queue, max_frame, zerocopy, flags);
	if (r)
		socket_give_back(&u, d->arena, r);
	/* Some guest's memory is not where it was. */
	if (r == -EFAULT)
		events_tell(&b->events, XN_EVENT_UMEM);
	if (r < 0)
		return r;
	x->port = &d->port;
	x->queue = queue;
	x->events = &b->events;
	x->received = &nq->rx;
	x->sent = &nq->tx;
	x->source = (struct source){.ops = x->sg ? &chains_source : &xsk_source,
				    .queue = queue,
				    .fd = x->fd,
				    .spins = true,
				    .unwatched = true,
				    .kicks = &nq->rx.kicks,
				    .bytes = {&nq->rx.bytes, &nq->tx.bytes}};
	workers_park(&b->workers);
	r = worker_add_source(worker_of(&b->workers, queue), &x->source, port);
	if (!r) {
		nq->xsk = x;
		nq->lost = false;
	}
	settle(d);
	workers_resume(&b->workers);
	if (r < 0)
		xsk_close(x);
	return r;
}

int xn_netdev_lends(struct xn_bridge *b, uint32_t port)
{
	const struct netdev *d = netdev_at(b, port);

	return d ? d->arena->zerocopy != XN_ZEROCOPY_OFF : -ENOENT;
}

int xn_netdev_is_stale(struct xn_bridge *b, uint32_t port, uint32_t zerocopy)
{
	const struct netdev *d = netdev_at(b, port);

	if (!d)
		return -ENOENT;
	for (u32 i = 0; i < d->queues; i++) {
		const struct xsk *x = d->queue[i].xsk;

		if (d->queue[i].lost)
			return 1;
		if (x && (x->stuck || x->umem != arena_umem(d->arena, zerocopy != XN_ZEROCOPY_OFF)))
			return 1;
	}
	return 0;
}

int xn_netdev_close_queue(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	struct netdev_queue *nq = queue_of(b, port, queue);

	if (!nq)
		return -ENOENT;
	workers_park(&b->workers);
	close_queue(netdev_at(b, port), nq);
	nq->lost = false;
	workers_resume(&b->workers);
	return 0;
}

int xn_netdev_queue_fd(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	const struct netdev_queue *nq = queue_of(b, port, queue);

	return nq && nq->xsk ? nq->xsk->fd : -ENOENT;
}

int xn_netdev_set_group_fd(struct xn_bridge *b, uint32_t port, int fd)
{
	struct netdev *d = netdev_at(b, port);
	struct worker *w = b->workers.each[0];
	int r = 0;

	if (!d)
		return -ENOENT;

	workers_park(&b->workers);
	drop_group(d);
	if (fd >= 0) {
		if (!w->group_frames)
			w->group_frames = calloc(GROUP_BATCH, sizeof(*w->group_frames));
		d->group_fd = w->group_frames ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
		r = d->group_fd < 0 ? (w->group_frames ? -errno : -ENOMEM) : 0;
		d->group_failed = false;
		d->group = (struct source){.ops = &group_source, .queue = d->queues, .fd = d->group_fd};
		if (!r)
			r = worker_add_source(w, &d->group, port);
		if (r && d->group_fd >= 0) {
			close(d->group_fd);
			d->group_fd = -1;
		}
	}
	workers_resume(&b->workers);
	return r;
}

int xn_netdev_xsk_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, struct xn_xsk_stats *out)
{
	const struct netdev_queue *nq = queue_of(b, port, queue);

	if (!nq)
		return -ENOENT;
	*out = nq->past;
	if (!nq->xsk)
		return 0;
	struct xsk *x = nq->xsk;

	(void)xsk_statistics(x, out);
	out->open = 1;
	out->zerocopy = x->zerocopy;
	out->frames_free = __atomic_load_n(&x->free_n, __ATOMIC_RELAXED);
	out->frames_fill = x->arena->frames / 2;
	out->frames_tx = x->arena->frames / 2 - out->frames_free;
	out->in_flight = __atomic_load_n(&x->lent_n, __ATOMIC_RELAXED);
	out->umem = x->umem_len;
	return 0;
}
