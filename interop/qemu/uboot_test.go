package qemu_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/interop/qemu"
)

var ubootTools = map[string]string{
	"qemu-system-aarch64":                   "qemu-system-arm",
	"/usr/lib/u-boot/qemu_arm64/u-boot.bin": "u-boot-qemu",
	"mkenvimage":                            "u-boot-tools",
	"fw_printenv":                           "libubootenv-tool",
	"mformat":                               "mtools",
	"sgdisk":                                "gdisk",
}

// Copies of the environment on the disk that the boot script in testdata/uboot.env
// reads and writes.
const (
	envCopy0 = 1 * mib
	envCopy1 = 1*mib + 64<<10
	envSize  = 0x4000
)

// uboot is an arm64 board with U-Boot. Its binary is Debian's, whose environment
// cannot be written by Linux here; so the boot script keeps the state in a redundant
// environment of its own, on the disk.
type uboot struct {
	*factory
	v1     *image
	disk   string
	flash  string // U-Boot's own environment: the boot script
	config string // fw_env.config for the host
}

func newUBoot(t *testing.T) *uboot {
	b := &uboot{factory: newFactory(t, findKernel(t, "arm64"))}
	b.v1 = b.image("v1", "", b.fat("vmlinuz", b.read(b.k.image)))

	b.flash = b.path("flash.img")
	run(t, "mkenvimage", "-s", "0x40000", "-o", b.flash, "testdata/uboot.env")
	require.NoError(t, os.Truncate(b.flash, 64*mib))

	text := "BOOT_ORDER=A\nBOOT_A_LEFT=3\nBOOT_B_LEFT=0\nboard=serial 42\n"
	require.NoError(t, os.WriteFile(b.path("env.txt"), []byte(text), 0o600))
	run(t, "mkenvimage", "-r", "-s", fmt.Sprint(envSize), "-o", b.path("env.img"), b.path("env.txt"))
	one := b.read(b.path("env.img"))
	env := make([]byte, envCopy1-envCopy0+envSize)
	copy(env, one)
	copy(env[envCopy1-envCopy0:], one)

	b.disk = b.factory.disk("disk.img", []part{
		{name: "env", size: mib, data: env},
		{name: "state", size: mib},
		{name: "kernel-a", size: 32 * mib, data: b.v1.parts["kernel"]},
		{name: "initrd-a", size: 16 * mib, data: b.v1.parts["initrd"]},
		{name: "kernel-b", size: 32 * mib},
		{name: "initrd-b", size: 16 * mib},
	})
	b.config = b.path("fw_env.config")
	lines := fmt.Sprintf("%s %#x %#x\n%s %#x %#x\n", b.disk, envCopy0, envSize, b.disk, envCopy1, envSize)
	require.NoError(t, os.WriteFile(b.config, []byte(lines), 0o600))
	return b
}

func (b *uboot) power(extra ...string) *machine {
	b.t.Helper()
	return power(b.t, "qemu-system-aarch64", append([]string{
		"-machine", "virt", "-cpu", "cortex-a57", "-m", "512", "-bios", "/usr/lib/u-boot/qemu_arm64/u-boot.bin",
		"-drive", "if=pflash,unit=1,format=raw,file=" + b.flash,
		"-drive", "if=none,id=disk,format=raw,cache=writeback,file=" + b.disk, "-device", "virtio-blk-pci,drive=disk,disable-legacy=on",
		"-device", "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
	}, extra...)...)
}

// variables reads the environment with Debian's fw_printenv.
func (b *uboot) variables() map[string]string {
	b.t.Helper()
	m := map[string]string{}
	for line := range strings.Lines(run(b.t, "fw_printenv", "-c", b.config)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		m[name] = value
	}
	return m
}

// TestUBoot: arm64, U-Boot.
func TestUBoot(t *testing.T) {
	needs(t, false, ubootTools)
	b := newUBoot(t)
	v2 := b.image("v2", "", b.v1.parts["kernel"])
	urls := map[string]string{
		"good":       b.bundle(v2),
		"panics":     b.bundle(b.image("panics", "exit", b.v1.parts["kernel"])),
		"unloadable": b.bundle(b.image("unloadable", "", b.fat("vmlinuz", []byte("this is no kernel")))),
	}
	m := b.power()
	committed := func(r qemu.Report, slot int) {
		t.Helper()
		require.True(t, r.Committed)
		require.Equal(t, slot, r.Active)
		name := string(rune('A' + slot))
		v := b.variables()
		require.Equal(t, name, v["BOOT_ORDER"])
		require.Equal(t, "3", v["BOOT_"+name+"_LEFT"])
		require.NotContains(t, v, "ota_trial")
		require.Equal(t, "serial 42", v["board"])
	}
	r := m.ready(0, "v1")
	require.Equal(t, b.v1.digests(), r.Digests)
	committed(r, 0)

	// Each of these ends in slot A, for the reason given.
	fails := func(bundle string, timeout int, reason string, trial func()) {
		t.Helper()
		r := m.do("update %s %d", urls[bundle], timeout)
		require.Equal(t, 1, r.Active)
		require.False(t, r.Committed)
		m.log("%s installed: %d bytes written, %d in place", bundle, r.Written, r.Skipped)
		v := b.variables()
		require.Equal(t, "B A", v["BOOT_ORDER"])
		require.Equal(t, "1", v["BOOT_B_LEFT"])
		require.Equal(t, "serial 42", v["board"])
		m.send("reboot")
		m.await(*bootLimit, `^LOADER slot B order B A left 3 0`)
		trial()
		m.await(*bootLimit, `^LOADER slot A`)
		r = m.ready(0, "v1")
		require.Equal(t, b.v1.digests(), r.Digests)
		require.Equal(t, "reverted", r.Outcome)
		require.Equal(t, reason, r.Reason)
		require.Equal(t, 1, r.LastSlot)
		committed(r, 0)
		m.log("back in slot A: %s", r.Reason)
	}
	onTrial := func(version string) qemu.Report {
		t.Helper()
		r := m.ready(1, version)
		require.True(t, r.Trial)
		return r
	}
	fails("good", 5, "commit timeout", func() {
		onTrial("v2")
		m.await(*bootLimit, "reboot: Restarting system")
	})
	fails("panics", 600, "boot loader fell back", func() { m.await(*bootLimit, panicLine) })
	fails("unloadable", 600, "boot loader fell back", func() { m.await(*bootLimit, `^LOADER cannot start slot B`) })
	fails("good", 600, "boot loader fell back", func() {
		onTrial("v2")
		m.send("hang")
		m.await(*bootLimit, "^"+qemu.Prefix+qemu.Hang)
	})

	m.do("update %s 600", urls["good"])
	m.send("reboot")
	r = onTrial("v2")
	require.Equal(t, v2.digests(), r.Digests)
	r = m.do("commit")
	require.Equal(t, "committed", r.Outcome)
	committed(r, 1)
	m.send("reboot")
	r = m.ready(1, "v2")
	require.Equal(t, "committed", r.Outcome)
	committed(r, 1)
	m.off()
}
