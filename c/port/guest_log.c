/*
 * The dirty log of a guest: what of its rings' writes is marked there, and whether there is room for all of it.
 *
 * Frames are logged while VHOST_F_LOG_ALL is negotiated, used rings while each of them says so (VHOST_VRING_F_LOG), and both
 * once there is a log: the three come in any order, while rings run.
 */
#define _GNU_SOURCE
#include <linux/vhost_types.h>

#include "guest.h"

static bool logs_frames(u64 features)
{
	return features >> VHOST_F_LOG_ALL & 1;
}

static bool fits(const struct guest *g, const struct dirty_log *log, const struct mem *m)
{
	for (u32 i = 0; i < 2 * g->pairs; i++) {
		const struct virtqueue *q = &g->rings[i];

		if (q->started && q->config.logs && !dirty_covers(log, q->config.log_addr, vring_device_size(q)))
			return false;
	}
	return dirty_covers_all(log, m);
}

bool guest_log_fits(const struct guest *g, const struct mem *m, u64 features)
{
	bool wanted = logs_frames(features);

	for (u32 i = 0; i < 2 * g->pairs; i++)
		wanted |= g->rings[i].started && g->rings[i].config.logs;
	return !g->log || !wanted || fits(g, g->log, m);
}

void guest_settle_log(struct guest *g)
{
	/* By layout, and whether it is logged. */
	static const struct source_ops *const transmit[2][2] = {{&split_source, &split_logged_source},
								{&packed_source, &packed_logged_source}};

	for (u32 i = 0; i < 2 * g->pairs; i++) {
		struct virtqueue *q = &g->rings[i];
		const struct dirty_log *log = q->log;
		const u64 log_used = q->log_used;
		const bool logged = q->logs_used;

		q->logs_frames = g->log && q->started && logs_frames(g->features);
		q->logs_used = g->log && q->started && q->config.logs;
		q->log = q->logs_frames || q->logs_used ? g->log : NULL;
		q->log_used = q->config.log_addr;
		q->log_fd = g->log_fd;
		if (i % 2 == XN_TX)
			q->source.ops = transmit[q->is_packed][!!q->log];
		if (!q->logs_used)
			continue;
		if (q->is_packed)
			(void)mem_guest(q->mem, (const u8 *)q->packed.desc, &q->log_desc);
		if (!logged || log != q->log || log_used != q->log_used)
			vring_log_all(q);
	}
}

int xn_guest_set_log(struct xn_bridge *b, uint32_t port, int fd, uint64_t offset, uint64_t size)
{
	struct guest *g = guest_at(b, port);
	struct dirty_log *log = g && fd >= 0 ? dirty_open(fd, offset, size) : NULL;

	if (!g)
		return -ENOENT;
	if (!log && fd >= 0)
		return -errno;
	if (log && !fits(g, log, g->mem)) {
		dirty_close(log);
		return -ENOSPC;
	}
	workers_park(&b->workers);
	struct dirty_log *old = g->log;

	g->log = log;
	guest_settle_log(g);
	workers_resume(&b->workers);
	dirty_close(old);
	return 0;
}

int xn_guest_set_log_fd(struct xn_bridge *b, uint32_t port, int fd)
{
	struct guest *g = guest_at(b, port);

	if (!g)
		return -ENOENT;
	workers_park(&b->workers);
	int r = guest_keep_fd(&g->log_fd, fd);

	guest_settle_log(g);
	workers_resume(&b->workers);
	return r;
}

int xn_ring_set_log(struct xn_bridge *b, uint32_t port, uint32_t ring, int logs, uint64_t log_addr)
{
	struct guest *g = guest_at(b, port);
	struct virtqueue *q = g && ring < 2 * g->pairs ? &g->rings[ring] : NULL;

	if (!q)
		return -ENOENT;
	if (!q->started)
		return -EINVAL;
	if (logs && g->log &&
	    (!dirty_covers(g->log, log_addr, vring_device_size(q)) || !dirty_covers_all(g->log, g->mem)))
		return -ENOSPC;
	workers_park(&b->workers);
	q->config.logs = !!logs;
	q->config.log_addr = log_addr;
	guest_settle_log(g);
	workers_resume(&b->workers);
	return 0;
}
