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
	int r = workers_init(&b->workers, config);

	b->fdb = fdb_new(config->ageing_s, config->max_macs);
	if (!r && !b->fdb)
		r = -errno;
	if (!r)
		r = events_init(&b->events);
	if (!r)
		r = arena_init(&b->arena, config->netdev_queues, frames, config->zerocopy);
	if (r < 0) {
		xn_bridge_free(b);
		errno = -r;
		return NULL;
	}
	return b;
}

int xn_bridge_start(struct xn_bridge *b)
{
	return workers_start(&b->workers);
}

int xn_bridge_stop(struct xn_bridge *b)
{
	workers_stop(&b->workers);
	return 0;
}

void xn_bridge_free(struct xn_bridge *b)
{
	if (!b)
		return;
	xn_bridge_stop(b);
	for (u32 i = 0; i < b->ports_n; i++)
		if (b->ports[i])
			xn_port_remove(b, i);
	workers_release(&b->workers);
	arena_release(&b->arena);
	events_release(&b->events);
	fdb_free(b->fdb);
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
	const struct workers *all = &b->workers;

	if (worker >= all->n)
		return -ENOENT;
	*out = all->each[worker]->stats;
	/* One that has been let go, and does not go, is not parked. */
	if (out->at == XN_PARKED && !__atomic_load_n(&all->parking.wanted, __ATOMIC_ACQUIRE))
		out->at = XN_AT_REST;
	if (!__atomic_load_n(&all->running, __ATOMIC_ACQUIRE))
		out->at = XN_PARKED;
	return 0;
}

int xn_port_cycles(struct xn_bridge *b, uint32_t port, uint64_t *cycles)
{
	u64 sum = 0;

	if (port >= XN_MAX_PORTS || !b->ports[port])
		return -ENOENT;
	for (u32 i = 0; i < b->workers.n; i++)
		sum += __atomic_load_n(&b->workers.each[i]->accounts[port].had, __ATOMIC_RELAXED);
	*cycles = sum;
	return 0;
}

uint64_t xn_bridge_parked_ns(const struct xn_bridge *b)
{
	return b->workers.parking.total;
}

int xn_bridge_tune(struct xn_bridge *b, uint32_t spin_us, uint32_t ageing_s)
{
	workers_park(&b->workers);
	workers_set_spin(&b->workers, spin_us);
	b->fdb->ageing_s = ageing_s;
	workers_resume(&b->workers);
	return 0;
}

void xn_bridge_gone(const struct xn_bridge *b, uint32_t way, struct xn_queue_stats *out)
{
	*out = b->gone[way == XN_OUT];
}

int xn_time_advance(struct xn_bridge *b, uint64_t us)
{
	int r = clock_advance(us);

	if (!r)
		workers_go_round(&b->workers);
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
	if (port >= XN_MAX_PORTS || !b->ports[port])
		return -ENOENT;
	fdb_flush(b->fdb, port, false);
	events_tell(&b->events, XN_EVENT_FDB);
	return 0;
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

	if (port >= XN_MAX_PORTS || !b->ports[port])
		return -ENOENT;
	if (n > XN_MAX_OWN_MACS)
		return -EINVAL;
	for (u32 i = 0; i < n; i++) {
		values[i] = station_of(&macs[i * ETH_ALEN]);
		if (!values[i])
			return -EINVAL;
	}
	workers_park(&b->workers);
	struct port *p = b->ports[port];

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
	bridge_settle(b);
	workers_resume(&b->workers);
	events_tell(&b->events, XN_EVENT_FDB);
	return r;
}

/* ---- public: ports ---- */

int bridge_add_port(struct xn_bridge *b, struct port *p)
{
	for (u32 id = 0; id < XN_MAX_PORTS; id++) {
		if (b->ports[id])
			continue;
		p->bridge = b;
		p->id = id;
		b->ports[id] = p;
		if (id >= b->ports_n)
			b->ports_n = id + 1;
		for (u32 i = 0; i < b->workers.n; i++)
			b->workers.each[i]->accounts[id].had = 0;
		return (int)id;
	}
	return -ENOSPC;
}

void bridge_settle(struct xn_bridge *b)
{
	for (u32 i = 0; i < b->ports_n; i++)
		if (b->ports[i] && b->ports[i]->verbs->settle)
			b->ports[i]->verbs->settle(b->ports[i]);
}

/* While parked: what the port has counted stays in the bridge's books. */
static void bequeath(struct xn_bridge *b, const struct port *p)
{
	const struct xn_queue_stats *from;

	for (u32 direction = XN_RX; direction <= XN_TX; direction++)
		for (u32 queue = 0; (from = p->verbs->stats(p, queue, direction)); queue++) {
			uint64_t *to = (uint64_t *)&b->gone[(direction == XN_TX) == p->wire ? XN_OUT : XN_IN];

			for (u32 i = 0; i < sizeof(*from) / sizeof(*to); i++)
				to[i] += ((const uint64_t *)from)[i];
		}
}

int xn_port_remove(struct xn_bridge *b, uint32_t port)
{
	if (port >= XN_MAX_PORTS || !b->ports[port])
		return -ENOENT;
	struct port *p = b->ports[port];

	p->verbs->park(p);
	bequeath(b, p);
	b->ports[port] = NULL;
	p->verbs->release(p);
	fdb_set_here(b->fdb, port, false, monotonic_s());
	fdb_flush(b->fdb, port, true);
	bridge_settle(b);
	workers_resume(&b->workers);
	events_tell(&b->events, XN_EVENT_FDB | XN_EVENT_UMEM);
	return 0;
}

int xn_queue_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t direction, struct xn_queue_stats *out)
{
	if (port >= XN_MAX_PORTS || !b->ports[port] || direction > XN_TX)
		return -ENOENT;
	const struct xn_queue_stats *from = b->ports[port]->verbs->stats(b->ports[port], queue, direction);

	if (!from)
		return -ENOENT;
	const uint64_t *words = (const uint64_t *)from;

	for (u32 i = 0; i < sizeof(*out) / sizeof(*words); i++)
		((uint64_t *)out)[i] = counted(&words[i]);
	return 0;
}
