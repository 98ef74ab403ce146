/*
 * A guest port: what its guest has agreed to, and may say.
 */
#include <stdlib.h>

#include "bridge.h"
#include "vnet.h"

enum { VLAN_MAX = 4095 };

void guest_release(struct port *p)
{
	struct guest *g = &p->guest;

	for (u32 i = 0; i < 2 * g->pairs; i++)
		guest_close_ring(&g->rings[i]);
	mem_free(g->mem);
	free(g->rings);
	*g = (struct guest){0};
}

int xn_guest_set_features(struct xn_bridge *b, uint32_t port, uint64_t features)
{
	const u64 layout = 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
			   1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_RING_PACKED |
			   1ull << VIRTIO_F_IN_ORDER;
	struct port *p = bridge_port(b, port, PORT_GUEST);

	if (!p)
		return -ENOENT;
	if ((p->guest.features ^ features) & layout)
		for (u32 i = 0; i < 2 * p->guest.pairs; i++)
			if (p->guest.rings[i].started)
				return -EBUSY;
	p->guest.features = features;
	p->guest.sends = vnet_sends(features);
	p->guest.takes = vnet_takes(features);
	return 0;
}

int xn_guest_set_ips(struct xn_bridge *b, uint32_t port, const struct xn_ip *ips, uint32_t n)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);

	if (!p)
		return -ENOENT;
	if (n > XN_MAX_IPS)
		return -EINVAL;
	for (u32 i = 0; i < n; i++)
		if (ips[i].version != 4 && ips[i].version != 6)
			return -EINVAL;
	workers_park(b);
	p->guest.guard = (struct guard){.n = n};
	memcpy(p->guest.guard.ips, ips, n * sizeof(*ips));
	workers_resume(b);
	return 0;
}

int xn_guest_remember(struct xn_bridge *b, uint32_t port, const uint8_t mac[6], uint32_t vlan)
{
	struct port *p = bridge_port(b, port, PORT_GUEST);
	u64 value = 0;

	if (!p)
		return -ENOENT;
	memcpy(&value, mac, ETH_ALEN);
	value = le64toh(value);
	if (mac_is_group(value) || !value || vlan > VLAN_MAX)
		return -EINVAL;
	if (p->check_source)
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

int xn_guest_stray(struct xn_bridge *b, uint32_t port, uint8_t mac[6])
{
	struct port *p = bridge_port(b, port, PORT_GUEST);

	if (!p)
		return -ENOENT;
	u64 stray = __atomic_exchange_n(&p->guest.stray, 0, __ATOMIC_RELAXED), value = htole64(stray);

	memcpy(mac, &value, ETH_ALEN);
	return !!stray;
}

int xn_guest_announce(struct xn_bridge *b, uint32_t port, const uint8_t mac[6])
{
	struct port *p = bridge_port(b, port, PORT_GUEST);
	u64 value = 0;

	if (!p)
		return -ENOENT;
	memcpy(&value, mac, ETH_ALEN);
	workers_park(b);
	/* Worker 0 has the first pair of every guest: what it owes for this frame it does when it goes on. */
	bool sent = bridge_announce(b->workers[0], p, le64toh(value), &p->guest.rings[XN_TX].stats);

	workers_resume(b);
	return sent ? 0 : -EPERM;
}
