package qemu_test

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/boot/grub"
	"github.com/slotota/ota/interop/qemu"
)

// grubFiles are Debian's.
const grubFiles = "/usr/lib/grub/i386-pc/"

// TestGRUB: a PC with a BIOS, GRUB with the script that the library ships.
func TestGRUB(t *testing.T) {
	needs(t, true, map[string]string{
		"qemu-system-x86_64":   "qemu-system-x86",
		grubFiles + "boot.img": "grub-pc-bin",
		"grub-editenv":         "grub-common",
		"mke2fs":               "e2fsprogs",
		"mformat":              "mtools",
		"sgdisk":               "gdisk",
	})
	f := newFactory(t, findKernel(t, "amd64"))
	f.parts = func(kernel, initramfs []byte) map[string][]byte {
		return map[string][]byte{"system": f.fat(file{"/vmlinuz", kernel}, file{"/initrd", initramfs})}
	}
	d := &device{
		factory: f, v1: f.image("v1", "", nil),
		starts:  [2]string{`LOADER slot A`, `LOADER slot B`},
		refuses: `LOADER cannot start slot B`,
	}
	const bootAt, bootSize = 2 * mib, 16 * mib
	disk := f.disk("disk.img", []part{
		{name: "grub", size: mib, kind: "ef02"},
		{name: "boot", size: bootSize, data: grubBoot(f, bootSize)},
		{name: "state", size: mib},
		{name: "system-a", size: 32 * mib, data: d.v1.parts["system"]},
		{name: "system-b", size: 32 * mib},
	})
	installGRUB(f, disk, mib)
	d.power = func() *machine {
		return power(t, "qemu-system-x86_64", "-machine", "pc", "-cpu", "qemu64", "-m", "384",
			"-drive", "if=none,id=disk,format=raw,cache=writeback,file="+disk, "-device", "virtio-blk-pci,drive=disk",
			"-device", "virtio-net-pci,netdev=net,romfile=")
	}
	d.selected = func(slot int, trial bool) {
		t.Helper()
		v := grubVariables(f, disk, bootAt, bootSize)
		name := string(rune('A' + slot))
		require.Equal(t, "serial 42", v["board"])
		require.Equal(t, name, v["ORDER"][:1])
		require.Equal(t, "1", v[name+"_OK"])
		require.Equal(t, "0", v[name+"_TRY"])
		if trial {
			require.Equal(t, name, v["ota_trial"])
		} else {
			require.NotContains(t, v, "ota_trial")
		}
	}
	d.test()
}

// grubBoot makes the file system with the script and the environment block.
func grubBoot(f *factory, size int64) []byte {
	t := f.t
	script := grub.Script
	for old, new := range map[string]string{
		"hd0,gpt2":                          "hd0,gpt4",
		"hd0,gpt3":                          "hd0,gpt5",
		"panic=5 rauc.slot=$slot":           qemu.PC + " rauc.slot=$slot ota.loader=grub",
		"if linux /vmlinuz":                 "echo \"LOADER slot $slot order $ORDER\"\nif linux /vmlinuz",
		"# The kernel could not be loaded.": "echo \"LOADER cannot start slot $slot\"",
	} {
		require.Equal(t, 1, strings.Count(script, old), old)
		script = strings.Replace(script, old, new, 1)
	}
	script = "serial --unit=0\nterminal_output serial\n" + script
	dir := f.path("boot")
	require.NoError(t, os.MkdirAll(dir+"/grub", 0o755))
	require.NoError(t, os.WriteFile(dir+"/grub/grub.cfg", []byte(script), 0o644))
	env := dir + "/grub/grubenv"
	run(t, "grub-editenv", env, "create")
	run(t, "grub-editenv", env, "set", "ORDER=A", "A_OK=1", "A_TRY=0", "board=serial 42")
	img := f.path("boot.img")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, size))
	run(t, "mke2fs", "-q", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", "-d", dir, img)
	return f.read(img)
}

// installGRUB does what grub-install does, on a disk that is a file: boot.img in the
// first sector has the place of core.img, whose first sector has the place of the
// rest (grub, include/grub/i386/pc/boot.h).
func installGRUB(f *factory, disk string, at int64) {
	t := f.t
	core := f.path("core.img")
	run(t, "grub-mkimage", "-O", "i386-pc", "-p", "(hd0,gpt2)/grub", "-o", core,
		"biosdisk", "part_gpt", "fat", "ext2", "normal", "loadenv", "test", "linux", "serial", "terminal", "echo", "configfile", "reboot")
	const (
		kernelSector = 0x5c  // in boot.img
		driveCheck   = 0x66  // in boot.img: a jump, to be two nops
		blocklist    = 0x1f4 // in core.img
		code         = 440   // of the first sector; then comes the partition table
	)
	boot := f.read(grubFiles + "boot.img")[:code]
	le := binary.LittleEndian
	le.PutUint64(boot[kernelSector:], uint64(at/sectorSize))
	boot[driveCheck], boot[driveCheck+1] = 0x90, 0x90
	image := f.read(core)
	le.PutUint64(image[blocklist:], uint64(at/sectorSize+1))
	d, err := os.OpenFile(disk, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer d.Close()
	_, err = d.WriteAt(boot, 0)
	require.NoError(t, err)
	_, err = d.WriteAt(image, at)
	require.NoError(t, err)
}

// grubVariables reads the environment block as GRUB does, without the journal of
// the file system: with Debian's debugfs and grub-editenv.
func grubVariables(f *factory, disk string, at, size int64) map[string]string {
	f.t.Helper()
	d, err := os.Open(disk)
	require.NoError(f.t, err)
	defer d.Close()
	b := make([]byte, size)
	_, err = d.ReadAt(b, at)
	require.NoError(f.t, err)
	img, env := f.path("seen.img"), f.path("seen.env")
	require.NoError(f.t, os.WriteFile(img, b, 0o600))
	run(f.t, "debugfs", "-c", "-R", "dump /grub/grubenv "+env, img)
	m := map[string]string{}
	for line := range strings.Lines(run(f.t, "grub-editenv", env, "list")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		m[name] = value
	}
	return m
}
