package qemu_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/uboot"
	"github.com/slotota/ota/flash/fileflash"
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

// The flash of the board, and U-Boot's own environment in it: one sector.
const (
	flashSize    = 64 * mib
	flashEnvSize = 0x40000
)

// ubootBoard is an arm64 board with U-Boot. Its binary is Debian's, which keeps one
// copy of its environment in NOR flash (CONFIG_ENV_IS_IN_FLASH). Nobody can change it
// here. Debian's kernels for arm64 and armhf lack CONFIG_MTD_CFI; that for MIPS Malta, the
// other board whose U-Boot Debian has with the environment in flash, lacks
// CONFIG_MTD_PHYSMAP_OF, and its device tree says that the environment is read-only.
// And saveenv of both boards fails in QEMU 7.2 ("Flash buffer write timeout", in the
// second sector). So the boot script keeps the state in a redundant environment of
// its own, on the disk. Slots have two parts. [TestUBootFlash] has what U-Boot makes
// of the one in flash.
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
	run(t, "mkenvimage", "-s", fmt.Sprint(flashEnvSize), "-o", b.flash, "testdata/uboot.env")
	require.NoError(t, os.Truncate(b.flash, flashSize))

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
	args := []string{"-device", "virtio-net-pci,netdev=net,disable-legacy=on,romfile=", "-device", "virtio-blk-pci,drive=disk,disable-legacy=on"}
	if log == "" {
		args = append(args, "-drive", "if=none,id=disk,format=raw,cache=writeback,file="+b.disk)
	} else {
		args = append(args, "-blockdev", "driver=file,node-name=file,filename="+b.disk,
			"-blockdev", "driver=file,node-name=log,filename="+log,
			"-blockdev", "driver=blklogwrites,node-name=disk,file=file,log=log,log-super-update-interval=1")
	}
	return powerUBoot(b.t, b.flash, args...)
}

// powerUBoot starts a board whose environment is in flash.
func powerUBoot(t *testing.T, flash string, more ...string) *machine {
	t.Helper()
	return power(t, "qemu-system-aarch64", append([]string{
		"-machine", "virt", "-cpu", "cortex-a57", "-m", "512", "-bios", "/usr/lib/u-boot/qemu_arm64/u-boot.bin",
		"-drive", "if=pflash,unit=1,format=raw,file=" + flash,
	}, more...)...)
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

// TestUBootFlash: U-Boot loads from its NOR flash, and acts on, what the library has
// written there.
func TestUBootFlash(t *testing.T) {
	needs(t, false, ubootTools)
	f := &factory{t: t, dir: t.TempDir()}
	flash := f.path("flash.img")
	text := "BOOT_ORDER=A\nBOOT_A_LEFT=3\nBOOT_B_LEFT=0\nboard=serial 42\nbootdelay=0\n" +
		"bootcmd=run slot_pick; echo LOADER ${board}: slot ${sel} order ${BOOT_ORDER} left ${BOOT_A_LEFT} ${BOOT_B_LEFT}\n"
	for line := range strings.Lines(string(f.read("testdata/uboot.env"))) {
		if strings.HasPrefix(line, "slot_pick=") {
			text += line
		}
	}
	require.NoError(t, os.WriteFile(f.path("env.txt"), []byte(text), 0o600))
	run(t, "mkenvimage", "-s", fmt.Sprint(flashEnvSize), "-o", flash, f.path("env.txt"))
	require.NoError(t, os.Truncate(flash, flashSize))

	file, err := fileflash.Open(flash, nil)
	require.NoError(t, err)
	defer file.Close()
	region, err := ota.Region(file, 0, flashEnvSize)
	require.NoError(t, err)
	env, err := uboot.NewEnv([]ota.Flash{region}, &uboot.EnvOptions{AllowSingle: true})
	require.NoError(t, err)
	d, err := uboot.NewDriver(env, &uboot.DriverConfig{Names: []string{"A", "B"}})
	require.NoError(t, err)
	boots := func(want string) {
		t.Helper()
		m := powerUBoot(t, flash)
		defer m.cut()
		m.await(*bootLimit, `^Loading Environment from Flash\.\.\. OK`)
		_, match := m.await(*bootLimit, `^LOADER (.*)`)
		m.log("%s", match[1])
		require.Equal(t, "serial 42: "+want, match[1])
	}
	boots("slot A order A left 2 0")
	for _, tc := range []struct {
		c    driver.Choice
		want string
	}{
		{driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 16}, "slot B order B A left 3 f"},
		{driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1, Booted: true}, "slot B order B A left 3 0"},
		{driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 0, Booted: true}, "slot A order B A left 2 0"},
		{driver.Choice{Active: 1, Revert: ota.NoSlot}, "slot B order B left 3 2"},
	} {
		require.NoError(t, d.Write(t.Context(), tc.c))
		boots(tc.want)
	}

	b := make([]byte, 1)
	_, err = region.ReadAt(b, flashEnvSize-1)
	require.NoError(t, err)
	b[0] ^= 1
	_, err = region.WriteAt(b, flashEnvSize-1)
	require.NoError(t, err)
	m := powerUBoot(t, flash)
	m.await(*bootLimit, `^Loading Environment from Flash\.\.\. .*bad CRC`)
	m.cut()
	_, err = env.Read(t.Context())
	require.ErrorIs(t, err, uboot.ErrNoEnvironment)
}
