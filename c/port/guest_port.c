/* A guest port's control: it is made and ends, and what its guest has agreed to, and may say. */
#include <stdlib.h>

#include "frame/vnet.h"
#include "guest.h"

enum { VLAN_MAX = 4095 };

static const struct xn_queue_stats *stats(const struct port *p, u32 queue, enum xn_direction direction)
{
	const struct guest *g = guest_of(p);

	return queue < g->pairs ? &g->rings[2 * queue + direction].stats : NULL;
}

static void release(struct port *p)
{
	struct guest *g = guest_of(p);

	for (u32 i = 0; i < 2 * g->pairs; i++)
		guest_close_ring(&g->rings[i]);
	mem_free(g->mem);
	dirty_close(g->log);
	guest_close_fd(&g->log_fd);
	free(g->rings);
	free(g);
}

static const struct port_verbs verbs = {.deliver = guest_deliver,
					.stats = stats,
					.settle = guest_settle_lending,
					.park = guest_park,
					.release = release};

/* NULL: out of memory. */
static struct guest *guest_new(struct xn_bridge *b, u32 pairs)
{
	const size_t size = 2 * pairs * sizeof(struct virtqueue);
	struct virtqueue *rings = aligned_alloc(XN_CACHELINE, size);
	struct guest *g = calloc(1, sizeof(*g));

	if (!g || !rings) {
		free(rings);
		free(g);
		return NULL;
	}
	memset(rings, 0, size);
	g->port.verbs = &verbs;
	g->port.kind = PORT_GUEST;
	g->pairs = pairs;
	g->log_fd = -1;
	g->rings = rings;
	for (u32 i = 0; i < 2 * pairs; i++) {
		rings[i].port = &g->port;
		rings[i].alarms = &g->alarms;
		rings[i].lending = &g->lending;
		rings[i].events = &b->events;
		rings[i].index = i;
		rings[i].kick_fd = rings[i].call_fd = rings[i].err_fd = -1;
		/* A power of two. */
		rings[i].backlog.room = 1u << (31 - __builtin_clz(BACKLOG_BYTES / pairs));
	}
	return g;
}

int xn_port_add_guest(struct xn_bridge *b, uint32_t pairs)
{
	if (!pairs || pairs > XN_MAX_PAIRS)
		return -EINVAL;
	struct guest *g = guest_new(b, pairs);

	if (!g)
		return -ENOMEM;
	workers_park(&b->workers);
	int id = bridge_add_port(b, &g->port);

	if (id < 0)
		release(&g->port);
	workers_resume(&b->workers);
	return id;
}

int xn_guest_set_features(struct xn_bridge *b, uint32_t port, uint64_t features)
{
	const u64 layout = 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
			   1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_RING_PACKED |
			   1ull << VIRTIO_F_IN_ORDER;
	struct guest *g = guest_at(b, port);

	if (!g)
		return -ENOENT;
	bool runs = false;

	for (u32 i = 0; i < 2 * g->pairs; i++)
		runs |= g->rings[i].started;
	if (runs && (g->features ^ features) & layout)
		return -EBUSY;
	if (!guest_log_fits(g, g->mem, features))
		return -ENOSPC;
	/* Nobody stands still for a guest that has nothing to do with workers. */
	if (runs)
		workers_park(&b->workers);
	g->features = features;
	guest_settle_log(g);
	g->sends = vnet_sends(features);
	g->port.takes = vnet_takes(features);
	if (runs)
		workers_resume(&b->workers);
	return 0;
}

int xn_guest_set_ips(struct xn_bridge *b, uint32_t port, const struct xn_ip *ips, uint32_t n)
{
	struct guest *g = guest_at(b, port);

	if (!g)
		return -ENOENT;
	if (n > XN_MAX_IPS)
		return -EINVAL;
	for (u32 i = 0; i < n; i++)
		if (ips[i].version != 4 && ips[i].version != 6)
			return -EINVAL;
	workers_park(&b->workers);
	g->guard = (struct guard){.n = n};
	memcpy(g->guard.ips, ips, n * sizeof(*ips));
	workers_resume(&b->workers);
	return 0;
}

int xn_guest_remember(struct xn_bridge *b, uint32_t port, const uint8_t mac[6], uint32_t vlan)
{
	struct guest *g = guest_at(b, port);
	u64 value = station_of(mac);

	if (!g)
		return -ENOENT;
	if (!value || vlan > VLAN_MAX)
		return -EINVAL;
	if (g->port.check_source)
		return -EPERM;
	switch (fdb_learn(b->fdb, value, (u16)vlan, port, FDB_GUEST, monotonic_s())) {
	case FDB_FOREIGN:
		return -EPERM;
	case FDB_FULL:
		return -ENOSPC;
	default:
		events_tell(&b->events, XN_EVENT_FDB);
		return 0;
	}
}

/* A copy, and whether it had not been asked for before. */
static bool take_offence(struct offence *o, struct offence *copy)
{
	spin_lock(&o->lock);
	*copy = *o;
	o->news = false;
	spin_unlock(&o->lock);
	return copy->news;
}

int xn_guest_stray(struct xn_bridge *b, uint32_t port, uint8_t mac[6])
{
	struct guest *g = guest_at(b, port);
	struct offence o;

	if (!g)
		return -ENOENT;
	bool news = take_offence(&g->port.spoof, &o);

	memcpy(mac, o.last.src, ETH_ALEN);
	return news;
}

int xn_guest_offence(struct xn_bridge *b, uint32_t port, uint32_t drop, struct xn_offence *out)
{
	struct guest *g = guest_at(b, port);

	if (!g)
		return -ENOENT;
	if (drop != XN_DROP_SPOOF && drop != XN_DROP_POLICY)
		return -EINVAL;
	struct offence *o = drop == XN_DROP_SPOOF ? &g->port.spoof : &g->port.policy;

	spin_lock(&o->lock);
	u64 at = o->at, now = cycles();

	*out = o->last;
	spin_unlock(&o->lock);
	out->age_ms = at && (s64)(now - at) > 0 ? (now - at) / clock_cycles_per_us() / 1000 : 0;
	return !!at;
}

static u64 starved_us(const struct virtqueue *q, u64 now)
{
	u64 since = vring_starved(q);

	return since && (s64)(now - since) > 0 ? (now - since) / clock_cycles_per_us() : 0;
}

int xn_guest_faults(struct xn_bridge *b, uint32_t port, struct xn_guest_faults *out)
{
	const struct guest *g = guest_at(b, port);
	u64 now = cycles(), longest = 0;

	if (!g)
		return -ENOENT;
	*out = (struct xn_guest_faults){0};
	for (u32 i = 0; i < 2 * g->pairs; i++) {
		const struct virtqueue *q = &g->rings[i];
		u64 us = starved_us(q, now);

		if (q->broken && !out->broken) {
			out->broken = q->broken;
			out->broken_ring = i;
		}
		if (us > longest) {
			longest = us;
			out->starved_ring = i;
		}
	}
	out->starved_us = longest;
	return 0;
}

int xn_guest_announce(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	struct guest *g = guest_at(b, port);
	u64 value = 0;

	if (!g)
		return -ENOENT;
	memcpy(&value, mac, ETH_ALEN);
	workers_park(&b->workers);
	/* Worker 0 has the first pair of every guest: what it owes for this frame it does when it goes on. */
	bool sent = bridge_announce(b->workers.each[0], &g->port, le64toh(value), &g->rings[XN_TX].stats);

	workers_resume(&b->workers);
	return sent ? 0 : -EPERM;
}
