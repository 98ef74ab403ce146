/*
 * The memory of a guest: its table, in which rings and frames are found.
 */
#include "guest.h"
#include "memory/staging.h"

/*
 * Swaps the table; every started ring follows, or stops if it is no longer in memory. `anew`: nothing of the old one is in
 * it. What was lost of that is no longer ours then; what a worker loses of the new one is.
 */
static void swap_memory(struct guest *g, struct mem *new, bool anew)
{
	struct mem *old = g->mem;
	u64 changes = g->port.bridge->arena.changes;

	guest_park(&g->port);
	g->mem = new;
	for (u32 i = 0; i < 2 * g->pairs; i++)
		if (g->rings[i].started && !guest_translate_ring(&g->rings[i], new))
			guest_stop_ring(&g->rings[i]);
	if (anew)
		g->alarms = (struct mem_alarms){0};
	guest_settle_log(g);
	guest_settle_rings(g);
	bridge_settle(g->port.bridge);
	workers_resume(&g->port.bridge->workers);
	mem_free(old);
	if (g->port.bridge->arena.windows_n || changes != g->port.bridge->arena.changes)
		events_tell(&g->port.bridge->events, XN_EVENT_UMEM);
}

static struct arena *arena_of(const struct guest *g)
{
	return g->port.check_source ? NULL : &g->port.bridge->arena;
}

int xn_guest_stages(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	const struct guest *g = guest_at(b, port);
	const struct arena *a = g ? arena_of(g) : NULL;
	struct extent e;

	if (!g)
		return -ENOENT;
	return a && !region->left_out && !staging_extent(region, &e) && arena_wants(a, e.huge) &&
	       arena_is_whole(region->fd);
}

int xn_guest_set_memory(struct xn_bridge *b, uint32_t port, const struct xn_region *regions, uint32_t n)
{
	struct guest *g = guest_at(b, port);
	struct mem *m = g ? mem_new() : NULL;
	int r = m ? 0 : g ? -ENOMEM : -ENOENT;

	for (u32 i = 0; i < n; i++) {
		if (r < 0)
			mem_drop_staged(&regions[i]);
		else
			r = mem_add(m, &regions[i], &g->alarms, arena_of(g));
	}
	if (!r && !guest_log_fits(g, m, g->features))
		r = -ENOSPC;
	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(g, m, true);
	return 0;
}

int xn_guest_add_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	struct guest *g = guest_at(b, port);
	struct mem *m = g ? mem_clone(g->mem) : NULL;

	if (!m) {
		mem_drop_staged(region);
		return g ? -ENOMEM : -ENOENT;
	}
	int r = mem_add(m, region, &g->alarms, arena_of(g));

	if (!r && !guest_log_fits(g, m, g->features))
		r = -ENOSPC;
	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(g, m, false);
	return 0;
}

int xn_guest_remove_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region)
{
	struct guest *g = guest_at(b, port);

	if (!g)
		return -ENOENT;
	struct mem *m = mem_clone(g->mem);

	if (!m)
		return -ENOMEM;
	int r = mem_remove(m, region);

	if (r < 0) {
		mem_free(m);
		return r;
	}
	swap_memory(g, m, false);
	return 0;
}

int xn_guest_leave_umem(struct xn_bridge *b, uint32_t port)
{
	struct guest *g = guest_at(b, port);
	bool windows = false;

	if (!g)
		return -ENOENT;
	const struct mem *old = g->mem;

	for (u32 i = 0; old && i < old->n; i++)
		windows |= old->regions[i].mapping->arena != NULL;
	if (!windows || !__atomic_load_n(&g->alarms.moved, __ATOMIC_ACQUIRE))
		return 0;
	struct mem *m = mem_clone(old);

	if (!m)
		return -ENOMEM;
	int r = mem_leave_windows(m);

	if (r < 0) {
		mem_free(m);
		/* Not moved but gone: its rings will break, and it is left out meanwhile. */
		if (r == -EINVAL)
			__atomic_store_n(&g->alarms.lost, 1, __ATOMIC_RELEASE);
		return r;
	}
	swap_memory(g, m, false);
	return 1;
}
