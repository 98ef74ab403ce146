/* The bridge: its ports, its table of addresses, its workers. */
#include "bridge.h"

#include <stdlib.h>

/* ---- public: the bridge ---- */

int xn_check_calls(void)
{
	struct caller c;
	int r = caller_init(&c);

	if (!r)
		caller_release(&c);
	return r;
}

struct xn_bridge *xn_bridge_new(const struct xn_bridge_config *config)
{
	u32 frames = config->frames_per_queue;

	if (!config->workers || config->workers > XN_MAX_WORKERS || config->zerocopy > XN_ZEROCOPY_ON ||
	    frames < XN_MIN_FRAMES || frames > XN_MAX_FRAMES || frames & (frames - 1) || !config->max_macs ||
	    config->max_macs > XN_MAX_MACS) {
		errno = EINVAL;
		return NULL;
	}
	struct xn_bridge *b = calloc(1, sizeof(*b));

	if (!b)
		return NULL;
	b->config = *config;
	b->events.fd = b->arena.watch = b->arena.ready.fd = -1;
	pthread_mutex_init(&b->parking.mutex, NULL);
	pthread_cond_init(&b->parking.changed, NULL);
	b->cycles_per_us = clock_cycles_per_us();
	b->spin_cycles = config->spin_us * b->cycles_per_us;
	b->fdb = fdb_new(config->ageing_s, config->max_macs);
	if (!b->fdb)
		goto fail;
	int r = events_init(&b->events);

	if (!r)
		r = arena_init(&b->arena, config->netdev_queues, frames, config->zerocopy);

	if (r < 0) {
		errno = -r;
		goto fail;
	}
	for (u32 i = 0; i < config->workers; i++) {
		b->workers[i] = worker_new(b, i);
		if (!b->workers[i])
			goto fail;
	}
	return b;
fail:;
	int error = errno;

	xn_bridge_free(b);
	errno = error;
	return NULL;
}

int xn_bridge_start(struct xn_bridge *b)
{
	if (b->running)
		return -EALREADY;
	b->running = true;
	for (u32 i = 0; i < b->config.workers; i++) {
		int r = worker_start(b->workers[i]);

		if (r < 0) {
			__atomic_store_n(&b->running, false, __ATOMIC_RELEASE);
			for (u32 done = 0; done < i; done++)
				worker_join(b->workers[done]);
			return r;
		}
	}
	return 0;
}

int xn_bridge_stop(struct xn_bridge *b)
{
	if (!b->running)
		return 0;
	__atomic_store_n(&b->running, false, __ATOMIC_RELEASE);
	for (u32 i = 0; i < b->config.workers; i++)
		worker_join(b->workers[i]);
	return 0;
}

void xn_bridge_free(struct xn_bridge *b)
{
	if (!b)
		return;
	xn_bridge_stop(b);
	for (u32 i = 0; i < b->ports_n; i++)
		if (b->ports[i].kind != PORT_NONE)
			xn_port_remove(b, i);
	for (u32 i = 0; i < b->config.workers; i++)
		worker_free(b->workers[i]);
	arena_release(&b->arena);
	events_release(&b->events);
	fdb_free(b->fdb);
	pthread_cond_destroy(&b->parking.changed);
	pthread_mutex_destroy(&b->parking.mutex);
	free(b);
}

int xn_bridge_lends(const struct xn_bridge *b)
{
	return b->arena.zerocopy != XN_ZEROCOPY_OFF;
}

int xn_bridge_event_fd(struct xn_bridge *b)
{
	return b->events.fd;
}

uint32_t xn_bridge_events(struct xn_bridge *b)
{
	return events_take(&b->events);
}

int xn_worker_stats(struct xn_bridge *b, uint32_t worker, struct xn_worker_stats *out)
{
	if (worker >= b->config.workers)
		return -ENOENT;
	*out = b->workers[worker]->stats;
	/* One that has been let go, and does not go, is not parked. */
	if (out->at == XN_PARKED && !__atomic_load_n(&b->parking.wanted, __ATOMIC_ACQUIRE))
		out->at = XN_AT_REST;
	if (!__atomic_load_n(&b->running, __ATOMIC_ACQUIRE))
		out->at = XN_PARKED;
	return 0;
}

int xn_time_advance(struct xn_bridge *b, uint64_t us)
{
	int r = clock_advance(us);

	if (!r)
		workers_go_round(b);
	return r;
}

/* ---- public: addresses ---- */

int xn_fdb_dump(struct xn_bridge *b, struct xn_fdb_entry *out, uint32_t max, uint32_t stations)
{
	return (int)fdb_dump(b->fdb, out, max, stations, monotonic_s());
}

void xn_fdb_count(struct xn_bridge *b, uint32_t *given, uint32_t *learned)
{
	fdb_count(b->fdb, given, learned, monotonic_s());
}

uint32_t xn_fdb_changes(struct xn_bridge *b)
{
	/* Acquire: what is counted is in the table. */
	return __atomic_load_n(&b->changes, __ATOMIC_ACQUIRE);
}

void xn_fdb_steered(struct xn_bridge *b, uint32_t changes)
{
	__atomic_store_n(&b->steered, changes, __ATOMIC_RELEASE);
	__atomic_store_n(&b->steers, true, __ATOMIC_RELEASE);
}

int xn_fdb_flush(struct xn_bridge *b, uint32_t port)
{
	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	fdb_flush(b->fdb, port, false);
	events_tell(&b->events, XN_EVENT_FDB);
	return 0;
}

/* The number of an address that a station may have; 0: it is none. */
static u64 station(const uint8_t mac[6])
{
	u64 value = 0;

	memcpy(&value, mac, ETH_ALEN);
	return mac_is_group(value) ? 0 : value;
}

/* Gives them to the port: all or none. */
static int give(struct xn_bridge *b, u32 port, const u64 *macs, u32 n)
{
	int r = 0;

	for (u32 i = 0; i < n && !r; i++)
		r = fdb_set_static(b->fdb, macs[i], port);
	if (r)
		fdb_flush(b->fdb, port, true);
	return r;
}

int xn_port_set_macs(struct xn_bridge *b, uint32_t port, const uint8_t *macs, uint32_t n, int check_source)
{
	u64 values[XN_MAX_OWN_MACS];

	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	if (!n || n > XN_MAX_OWN_MACS)
		return -EINVAL;
	for (u32 i = 0; i < n; i++) {
		values[i] = station(&macs[i * ETH_ALEN]);
		if (!values[i])
			return -EINVAL;
	}
	workers_park(b);
	struct port *p = &b->ports[port];

	if (p->macs_n && (p->macs_n != n || memcmp(p->macs, values, n * sizeof(*values))))
		fdb_flush(b->fdb, port, true);
	int r = give(b, port, values, n);

	if (r) {
		/* Their old places are free: nobody else runs. */
		(void)give(b, port, p->macs, p->macs_n);
	} else {
		memcpy(p->macs, values, n * sizeof(*values));
		p->macs_n = n;
		p->check_source = check_source;
	}
	guests_settle_lending(b);
	workers_resume(b);
	events_tell(&b->events, XN_EVENT_FDB);
	return r;
}

int xn_netdev_add_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	u64 value = station(mac);

	if (!bridge_port(b, port, PORT_NETDEV))
		return -ENOENT;
	int r = value ? fdb_set_static(b->fdb, value, port) : -EINVAL;

	if (!r)
		events_tell(&b->events, XN_EVENT_FDB);
	return r;
}

int xn_netdev_remove_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	if (!bridge_port(b, port, PORT_NETDEV) || !fdb_clear_static(b->fdb, station(mac), port))
		return -ENOENT;
	events_tell(&b->events, XN_EVENT_FDB);
	return 0;
}

/* ---- public: ports ---- */

/* A free port id, its port cleared; -ENOSPC. Call with the workers parked. */
static int port_new(struct xn_bridge *b, enum port_kind kind)
{
	for (u32 id = 0; id < XN_MAX_PORTS; id++) {
		if (b->ports[id].kind != PORT_NONE)
			continue;
		b->ports[id] = (struct port){.kind = kind, .id = id, .bridge = b};
		if (id >= b->ports_n)
			b->ports_n = id + 1;
		return (int)id;
	}
	return -ENOSPC;
}

int xn_port_add_guest(struct xn_bridge *b, uint32_t pairs)
{
	if (!pairs || pairs > XN_MAX_PAIRS)
		return -EINVAL;
	struct virtqueue *rings = aligned_alloc(XN_CACHELINE, 2 * pairs * sizeof(*rings));
	/* A power of two. */
	u32 share = 1u << (31 - __builtin_clz(BACKLOG_BYTES / pairs));

	if (!rings)
		return -ENOMEM;
	memset(rings, 0, 2 * pairs * sizeof(*rings));
	workers_park(b);
	int id = port_new(b, PORT_GUEST);

	if (id < 0) {
		free(rings);
	} else {
		struct port *p = &b->ports[id];

		p->guest.pairs = pairs;
		p->guest.rings = rings;
		for (u32 i = 0; i < 2 * pairs; i++) {
			rings[i].port = p;
			rings[i].alarms = &p->guest.alarms;
			rings[i].events = &b->events;
			rings[i].index = i;
			rings[i].kick_fd = rings[i].call_fd = rings[i].err_fd = -1;
			rings[i].backlog.room = share;
		}
	}
	workers_resume(b);
	return id;
}

int xn_port_add_netdev(struct xn_bridge *b, uint32_t queues)
{
	if (!queues || queues > XN_MAX_NETDEV_QUEUES)
		return -EINVAL;
	struct netdev_queue *queue = aligned_alloc(XN_CACHELINE, queues * sizeof(*queue));

	if (!queue)
		return -ENOMEM;
	memset(queue, 0, queues * sizeof(*queue));
	workers_park(b);
	int id = port_new(b, PORT_NETDEV);

	if (id < 0) {
		free(queue);
	} else {
		b->ports[id].netdev.queues = queues;
		b->ports[id].netdev.queue = queue;
		b->ports[id].netdev.group_fd = -1;
	}
	workers_resume(b);
	return id;
}

int xn_port_remove(struct xn_bridge *b, uint32_t port)
{
	if (port >= XN_MAX_PORTS || b->ports[port].kind == PORT_NONE)
		return -ENOENT;
	struct port *p = &b->ports[port];

	if (p->kind == PORT_GUEST) {
		guest_park(p);
		guest_release(p);
	} else {
		workers_park(b);
		netdev_release(p);
	}
	fdb_set_here(b->fdb, port, false, monotonic_s());
	fdb_flush(b->fdb, port, true);
	p->kind = PORT_NONE;
	guests_settle_lending(b);
	workers_resume(b);
	events_tell(&b->events, XN_EVENT_FDB | XN_EVENT_UMEM);
	return 0;
}

int xn_queue_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t direction, struct xn_queue_stats *out)
{
	const struct xn_queue_stats *from;

	if (port >= XN_MAX_PORTS || direction > XN_TX)
		return -ENOENT;
	const struct port *p = &b->ports[port];

	if (p->kind == PORT_GUEST && queue < p->guest.pairs)
		from = &p->guest.rings[2 * queue + direction].stats;
	else if (p->kind == PORT_NETDEV && queue < p->netdev.queues)
		from = direction == XN_RX ? &p->netdev.queue[queue].rx : &p->netdev.queue[queue].tx;
	else
		return -ENOENT;
	const uint64_t *words = (const uint64_t *)from;

	for (u32 i = 0; i < sizeof(*out) / sizeof(*words); i++)
		((uint64_t *)out)[i] = counted(&words[i]);
	return 0;
}
