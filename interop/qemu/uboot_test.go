package qemu_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
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

// ubootBoard is an arm64 board with U-Boot. Its binary is Debian's, whose environment
// cannot be written by Linux here; so the boot script keeps the state in a redundant
// environment of its own, on the disk. Slots have two parts.
type ubootBoard struct {
	*factory
	v1     *image
	disk   string
	flash  string // U-Boot's own environment: the boot script
	config string // fw_env.config for the host
}

func newUBoot(t *testing.T) *ubootBoard {
	b := &ubootBoard{factory: newFactory(t, findKernel(t, "arm64"))}
	b.parts = func(kernel, initramfs []byte) map[string][]byte {
		return map[string][]byte{"kernel": b.fat(file{"/vmlinuz", kernel}), "initrd": b.fat(file{"/initrd", initramfs})}
	}
	b.v1 = b.image("v1", "", nil)

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

// power starts the board. What it writes to its disk goes to log too, if it is not
// "", in the format of the kernel's dm-log-writes.
func (b *ubootBoard) power(log string) *machine {
	b.t.Helper()
	args := []string{
		"-machine", "virt", "-cpu", "cortex-a57", "-m", "512", "-bios", "/usr/lib/u-boot/qemu_arm64/u-boot.bin",
		"-drive", "if=pflash,unit=1,format=raw,file=" + b.flash,
		"-device", "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
		"-device", "virtio-blk-pci,drive=disk,disable-legacy=on",
	}
	if log == "" {
		args = append(args, "-drive", "if=none,id=disk,format=raw,cache=writeback,file="+b.disk)
	} else {
		args = append(args, "-blockdev", "driver=file,node-name=file,filename="+b.disk,
			"-blockdev", "driver=file,node-name=log,filename="+log,
			"-blockdev", "driver=blklogwrites,node-name=disk,file=file,log=log,log-super-update-interval=1")
	}
	return power(b.t, "qemu-system-aarch64", args...)
}

// variables reads the environment with Debian's fw_printenv.
func (b *ubootBoard) variables() map[string]string {
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
	d := &device{
		factory: b.factory, v1: b.v1,
		power:   func() *machine { return b.power("") },
		starts:  [2]string{`^LOADER slot A `, `^LOADER slot B `},
		refuses: `^LOADER cannot start slot B`,
	}
	d.selected = func(slot int, trial bool) {
		t.Helper()
		v := b.variables()
		require.Equal(t, "serial 42", v["board"])
		name := string(rune('A' + slot))
		require.Equal(t, name, v["BOOT_ORDER"][:1])
		if trial {
			require.Equal(t, name, v["ota_trial"])
			require.Equal(t, "1", v["BOOT_"+name+"_LEFT"])
			return
		}
		require.Equal(t, name, v["BOOT_ORDER"])
		require.Equal(t, "3", v["BOOT_"+name+"_LEFT"])
		require.NotContains(t, v, "ota_trial")
	}
	d.test()
}
