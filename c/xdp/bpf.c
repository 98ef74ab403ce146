/* The few bpf(2) calls that steering needs once a program is compiled. include/uapi/linux/bpf.h */
#define _GNU_SOURCE
#include <linux/bpf.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base.h"

#ifndef BPF_F_XDP_HAS_FRAGS
#define BPF_F_XDP_HAS_FRAGS (1u << 5) /* Linux 5.18 */
#endif

static int bpf(int command, union bpf_attr *attr)
{
	long r = syscall(__NR_bpf, command, attr, sizeof(*attr));

	return r < 0 ? -errno : (int)r;
}

int xn_bpf_map_update(int map_fd, const void *key, const void *value)
{
	union bpf_attr attr = {
		.map_fd = (u32)map_fd, .key = (uintptr_t)key, .value = (uintptr_t)value, .flags = BPF_ANY};

	return bpf(BPF_MAP_UPDATE_ELEM, &attr);
}

int xn_bpf_map_delete(int map_fd, const void *key)
{
	union bpf_attr attr = {.map_fd = (u32)map_fd, .key = (uintptr_t)key};

	return bpf(BPF_MAP_DELETE_ELEM, &attr);
}

int xn_bpf_map_lookup(int map_fd, const void *key, void *value)
{
	union bpf_attr attr = {.map_fd = (u32)map_fd, .key = (uintptr_t)key, .value = (uintptr_t)value};

	return bpf(BPF_MAP_LOOKUP_ELEM, &attr);
}

int xn_bpf_xdp_load_frags(const void *instructions, uint32_t n, const char *license)
{
	union bpf_attr attr = {0};

	attr.prog_type = BPF_PROG_TYPE_XDP;
	attr.expected_attach_type = BPF_XDP;
	attr.prog_flags = BPF_F_XDP_HAS_FRAGS;
	attr.insns = (uintptr_t)instructions;
	attr.insn_cnt = n;
	attr.license = (uintptr_t)license;
	return bpf(BPF_PROG_LOAD, &attr);
}

int xn_bpf_xdp_link(int prog_fd, uint32_t ifindex, uint32_t flags)
{
	union bpf_attr attr = {0};

	attr.link_create.prog_fd = (u32)prog_fd;
	attr.link_create.target_ifindex = ifindex;
	attr.link_create.attach_type = BPF_XDP;
	attr.link_create.flags = flags;
	return bpf(BPF_LINK_CREATE, &attr);
}

int xn_bpf_link_ifindex(int link_fd)
{
	struct bpf_link_info info = {0};
	union bpf_attr attr = {0};

	attr.info.bpf_fd = (u32)link_fd;
	attr.info.info_len = sizeof(info);
	attr.info.info = (uintptr_t)&info;
	int r = bpf(BPF_OBJ_GET_INFO_BY_FD, &attr);

	return r < 0 ? r : (int)info.xdp.ifindex;
}
