/*
 * Loads an XDP program that passes every frame, and keeps it on an interface in native mode, or in generic.
 *
 *   xdp_pass INTERFACE [generic]
 *
 * Says "attached" once it is, or what the kernel said; the program goes with this process (bpf_link).
 */
#include <errno.h>
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(int command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int say(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	const struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = XDP_PASS},
					   {.code = BPF_JMP | BPF_EXIT}};
	union bpf_attr load = {.prog_type = BPF_PROG_TYPE_XDP,
			       .insn_cnt = 2,
			       .insns = (uintptr_t)program,
			       .license = (uintptr_t) "GPL"};
	union bpf_attr link = {.link_create = {.attach_type = BPF_XDP, .flags = XDP_FLAGS_DRV_MODE}};

	if (argc > 2)
		link.link_create.flags = XDP_FLAGS_SKB_MODE;
	link.link_create.target_ifindex = if_nametoindex(argc > 1 ? argv[1] : "");
	if (!link.link_create.target_ifindex)
		return say("interface");
	link.link_create.prog_fd = (unsigned int)bpf(BPF_PROG_LOAD, &load);
	if ((int)link.link_create.prog_fd < 0)
		return say("load");
	if (bpf(BPF_LINK_CREATE, &link) < 0)
		return say("attach");
	puts("attached");
	fflush(stdout);
	pause();
	return 0;
}
