/*
 * The memory of a guest: its table, in which rings and frames are found.
 */
#include "bridge.h"
#include "staging.h"

/*
 * Swaps the table; every started ring follows, or stops if it is no longer in memory. `anew`: nothing of the old one is in
 * it. What was lost of that is no longer ours then; what a worker loses of the new one is.
 */
static void swap_memory(struct port *p, struct mem *new, bool anew)
{
	struct guest *g = &p->guest;
	struct mem *old = g->mem;
	u64 changes = p->bridge->arena.changes;

	guest_park(p);
	g->mem = new;
	for (u32 i = 0; i < 2 * g->pairs; i++)
		if (g->rings[i].started && !guest_translate_ring(&g->rings[i], new))
			guest_stop_ring(&g->rings[i]);
	if (anew)
		g->alarms = (struct mem_alarms){0};
	guest_settle(p);
	guests_settle_lending(p->bridge);
	workers_resume(p->bridge);
	mem_free(old);
	if (p->bridge->arena.windows_n || changes != p->bridge->arena.changes)
		events_tell(&p->bridge->events, XN_EVENT_UMEM);
}

static struct arena *arena_of(const struct port *p)
{
	return p->check_source ? NULL : &p->bridge->arena;
}

int xn_guest_stages(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	const struct port *p = bridge_port(b, port, PORT_GUEST);
	const struct arena *a = p ? arena_of(p) : NULL;
	struct extent e;

	if (!p)
		return -ENOENT;
	return a && !staging_extent(region, &e) && arena_wants(a, e.huge) && arena_is_whole(region->fd);
}

int xn_guest_set_memory(struct xn_bridge *b, uint32_t port, const struct xn_region *regions, uint32_t n)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);
	struct mem *m = p ? mem_new() : NULL;
	int r = m ? 0 : p ? -ENOMEM : -ENOENT;

	for (u32 i = 0; i < n; i++) {
		if (r < 0)
			mem_drop_staged(&regions[i]);
		else
			r = mem_add(m, &regions[i], &p->guest.alarms, arena_of(p));
	}
	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(p, m, true);
	return 0;
}

int xn_guest_add_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);
	struct mem *m = p ? mem_clone(p->guest.mem) : NULL;

	if (!m) {
		mem_drop_staged(region);
		return p ? -ENOMEM : -ENOENT;
	}
	int r = mem_add(m, region, &p->guest.alarms, arena_of(p));

	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(p, m, false);
	return 0;
}

int xn_guest_remove_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);

	if (!p)
		return -ENOENT;
	struct mem *m = mem_clone(p->guest.mem);

	if (!m)
		return -ENOMEM;
	int r = mem_remove(m, region);

	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(p, m, false);
	return 0;
}

int xn_guest_leave_umem(struct xn_bridge *b, uint32_t port)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);
	bool windows = false;

	if (!p)
		return -ENOENT;
	const struct mem *old = p->guest.mem;

	for (u32 i = 0; old && i < old->n; i++)
		windows |= old->regions[i].mapping->arena != NULL;
	if (!windows || !__atomic_load_n(&p->guest.alarms.moved, __ATOMIC_ACQUIRE))
		return 0;
	struct mem *m = mem_clone(old);

	if (!m)
		return -ENOMEM;
	int r = mem_leave_windows(m);

	if (r < 0) {
		mem_free(m);
		/* Not moved but gone: its rings will break, and it is left out meanwhile. */
		if (r == -EINVAL)
			__atomic_store_n(&p->guest.alarms.lost, 1, __ATOMIC_RELEASE);
		return r;
	}
	swap_memory(p, m, false);
	return 1;
}
