/*
 * A netdev port: AF_XDP sockets, one a queue, and an AF_PACKET socket for what XDP cannot hand to two receivers.
 *
 * XDP gives frames to known guests to the sockets and passes all else to the host's stack. Group-addressed frames go to
 * the host too; the AF_PACKET socket picks them up for the guests. It is the slow path: one system call a batch.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "bridge.h"

void netdev_settle(struct port *p)
{
	struct netdev *d = &p->netdev;
	u32 workers = p->bridge->config.workers;
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
			d->queue[i].xsk->shared = shared;
			d->queue[i].xsk->locked = shared || (workers > 1 && d->queue[i].xsk->umem);
		}
}

static struct netdev_queue *queue_of(struct xn_bridge *b, u32 port, u32 queue)
{
	struct port *p = bridge_port(b, port, PORT_NETDEV);

	return p && queue < p->netdev.queues ? &p->netdev.queue[queue] : NULL;
}

/* While parked. */
static void close_queue(struct port *p, struct netdev_queue *nq)
{
	struct xsk *x = nq->xsk;

	if (!x)
		return;
	/* The last chance for what was submitted in the turn before. */
	if (x->pending)
		(void)xsk_kick(x, &nq->tx.kicks);
	/* A socket whose interface is gone has no statistics any more. */
	(void)xsk_statistics(x, &nq->past);
	worker_remove_source(&x->source);
	for (u32 i = 0; i < p->bridge->config.workers; i++)
		worker_forget_xsk(p->bridge->workers[i], x);
	xsk_close(x);
	nq->xsk = NULL;
	netdev_settle(p);
}

void netdev_recall(struct xsk *x, bool patient)
{
	if (patient) {
		xsk_recall(x);
		xsk_reap(x);
		return;
	}
	struct netdev_queue *nq = &x->port->netdev.queue[x->queue];

	events_tell(&x->port->bridge->events, XN_EVENT_UMEM);
	close_queue(x->port, nq);
	nq->lost = true;
}

static void drop_group(struct netdev *d)
{
	if (d->group_fd < 0)
		return;
	worker_remove_source(&d->group);
	close(d->group_fd);
	d->group_fd = -1;
}

void netdev_release(struct port *p)
{
	struct netdev *d = &p->netdev;

	drop_group(d);
	for (u32 i = 0; i < d->queues; i++)
		close_queue(p, &d->queue[i]);
	free(d->queue);
	*d = (struct netdev){.group_fd = -1};
}

int xn_netdev_prepare(struct xn_bridge *b, uint32_t port, uint32_t max_frame, uint32_t zerocopy, uint32_t flags)
{
	if (!bridge_port(b, port, PORT_NETDEV))
		return -ENOENT;
	if (zerocopy > XN_ZEROCOPY_ON)
		return -EINVAL;
	int r = xsk_prepare(&b->arena, max_frame, zerocopy, flags);

	if (r == -EFAULT)
		events_tell(&b->events, XN_EVENT_UMEM);
	return r;
}

int xn_netdev_open_queue(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t ifindex, uint32_t max_frame,
			 uint32_t zerocopy, uint32_t flags)
{
	struct netdev_queue *nq = queue_of(b, port, queue);
	struct xsk *x;

	if (!nq)
		return -ENOENT;
	if (zerocopy > XN_ZEROCOPY_ON)
		return -EINVAL;
	if (nq->xsk)
		return -EALREADY;
	int r = xsk_open(&x, &b->arena, ifindex, queue, max_frame, zerocopy, flags);

	/* Some guest's memory is not where it was. */
	if (r == -EFAULT)
		events_tell(&b->events, XN_EVENT_UMEM);
	if (r < 0)
		return r;
	x->port = &b->ports[port];
	x->queue = queue;
	x->source = (struct source){.ops = x->sg ? &chains_source : &xsk_source,
				    .queue = queue,
				    .fd = x->fd,
				    .spins = true,
				    .unwatched = true,
				    .kicks = &nq->rx.kicks,
				    .bytes = {&nq->rx.bytes, &nq->tx.bytes}};
	workers_park(b);
	r = worker_add_source(b->workers[queue % b->config.workers], &x->source, port);
	if (!r) {
		nq->xsk = x;
		nq->lost = false;
	}
	netdev_settle(x->port);
	workers_resume(b);
	if (r < 0)
		xsk_close(x);
	return r;
}

int xn_netdev_is_stale(struct xn_bridge *b, uint32_t port, uint32_t zerocopy)
{
	const struct port *p = bridge_port(b, port, PORT_NETDEV);

	if (!p)
		return -ENOENT;
	for (u32 i = 0; i < p->netdev.queues; i++) {
		const struct xsk *x = p->netdev.queue[i].xsk;

		if (p->netdev.queue[i].lost)
			return 1;
		if (x && (x->stuck || x->umem != arena_umem(&b->arena, zerocopy != XN_ZEROCOPY_OFF)))
			return 1;
	}
	return 0;
}

int xn_netdev_close_queue(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	struct netdev_queue *nq = queue_of(b, port, queue);

	if (!nq)
		return -ENOENT;
	workers_park(b);
	close_queue(&b->ports[port], nq);
	nq->lost = false;
	workers_resume(b);
	return 0;
}

int xn_netdev_queue_fd(struct xn_bridge *b, uint32_t port, uint32_t queue)
{
	const struct netdev_queue *nq = queue_of(b, port, queue);

	return nq && nq->xsk ? nq->xsk->fd : -ENOENT;
}

int xn_netdev_set_group_fd(struct xn_bridge *b, uint32_t port, int fd)
{
	struct port *p = bridge_port(b, port, PORT_NETDEV);
	int r = 0;

	if (!p)
		return -ENOENT;
	struct netdev *d = &p->netdev;
	struct worker *w = b->workers[0];

	workers_park(b);
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
	workers_resume(b);
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
