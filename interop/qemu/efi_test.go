package qemu_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/boot/efi"
	"github.com/slotota/ota/interop/qemu"
)

const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

var efiTools = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86",
	ovmfCode:             "ovmf",
	"mformat":            "mtools",
	"sgdisk":             "gdisk",
}

// efiModules are those that the guest needs beside those of every machine.
var efiModules = []string{"efivarfs", "vfat", "nls_cp437", "nls_ascii"}

// powerEFI starts a PC with UEFI firmware, which keeps its variables in vars.
func powerEFI(t *testing.T, vars, disk string, more ...string) *machine {
	t.Helper()
	return power(t, "qemu-system-x86_64", append([]string{
		"-cpu", "qemu64", "-m", "384",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + ovmfCode,
		"-drive", "if=pflash,unit=1,format=raw,file=" + vars,
		// No bootindex: the firmware would rewrite BootOrder at every boot.
		"-drive", "if=none,id=disk,format=raw,cache=writeback,file=" + disk, "-device", "virtio-blk-pci,drive=disk",
		"-device", "virtio-net-pci,netdev=net,romfile=",
	}, more...)...)
}

// efiBoard is a PC whose firmware starts the kernel itself. Its disk has efibootmgr
// and efivar, too.
type efiBoard struct {
	*device
	disk, vars string
}

func newEFI(t *testing.T) *efiBoard {
	needs(t, true, efiTools)
	dir := unpacked(t, "efitools")
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	var programs []file
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, n := range names {
		programs = append(programs, file{"/" + n.Name(), f.read(filepath.Join(dir, n.Name()))})
	}
	f.parts = func(kernel, initramfs []byte) map[string][]byte {
		return map[string][]byte{"system": f.fat(file{"/vmlinuz", kernel}, file{"/initrd", initramfs})}
	}
	b := &efiBoard{device: &device{
		factory: f, v1: f.image("v1", "", nil),
		starts:  [2]string{`BdsDxe: starting Boot00A0 `, `BdsDxe: starting Boot.... "ota B"`},
		refuses: `BdsDxe: failed to load Boot.... "ota B"`,
	}}
	b.disk = f.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "system-a", size: 32 * mib, data: b.v1.parts["system"]},
		{name: "system-b", size: 32 * mib},
		{name: "tools", size: 8 * mib, data: f.fat(programs...)},
	})
	b.vars = f.variableStore("Boot00A0", b.option(2, "ota A", qemu.EFICmdline), "BootOrder", []byte{0xa0, 0})
	b.power = func() *machine { return powerEFI(t, b.vars, b.disk, "-machine", "q35") }
	b.selected = func(slot int, trial bool) {
		t.Helper()
		got := readVariables(t, f.read(b.vars))
		name := func(number []byte) string {
			v := got[fmt.Sprintf("Boot%04X", binary.LittleEndian.Uint16(number))]
			o, err := efi.ParseLoadOption(v)
			require.NoError(t, err)
			return o.Description
		}
		next, first := got["BootNext"], name(got["BootOrder"])
		if trial {
			require.Equal(t, "ota "+string(rune('A'+slot)), name(next))
			require.Equal(t, "ota "+string(rune('A'+1-slot)), first)
		} else {
			require.Empty(t, next)
			require.Equal(t, "ota "+string(rune('A'+slot)), first)
		}
	}
	return b
}

// option makes a load option for the kernel in a partition.
func (b *efiBoard) option(partition uint32, description, cmdline string) []byte {
	b.t.Helper()
	disk, err := os.Open(b.disk)
	require.NoError(b.t, err)
	defer disk.Close()
	hd, err := efi.Partition(disk, sectorSize, partition)
	require.NoError(b.t, err)
	option, err := (&efi.LoadOption{
		Attributes: efi.Active, Description: description, Path: []efi.Node{hd.Node(), efi.FileNode(`\vmlinuz`)},
		Optional: efi.EncodeString(cmdline),
	}).Bytes()
	require.NoError(b.t, err)
	return option
}

// TestBootNext: UEFI firmware without a boot loader.
func TestBootNext(t *testing.T) { newEFI(t).test() }

// TestEFITools: what the library has stored in the firmware, efibootmgr and efivar
// show; what efibootmgr stores is read, and booted.
func TestEFITools(t *testing.T) {
	b := newEFI(t)
	m := b.power()
	m.ready(0, "v1")
	m.do("update %s 36000", b.bundle(b.image("v2", "", nil)))
	m.send("reboot")
	m.ready(1, "v2")
	m.do("commit")

	out := m.tool("efibootmgr", "-v")
	t.Logf("\n%s", out)
	got := readVariables(t, b.read(b.vars))
	numbers := map[string]string{}
	for i, description := range []string{"ota A", "ota B"} {
		option := b.option(uint32(2+i), description, qemu.EFICmdline)
		o, err := efi.ParseLoadOption(option)
		require.NoError(t, err)
		data := strings.ReplaceAll(string(o.Optional), "\x00", ".")
		line := regexp.MustCompile(`(?m)^Boot(....)\* ` + regexp.QuoteMeta(fmt.Sprintf("%s\t%v/%v%s", description, o.Path[0], o.Path[1], data)) + `$`)
		match := line.FindStringSubmatch(out)
		require.NotNil(t, match, "%v", line)
		require.Equal(t, option, got["Boot"+match[1]])
		numbers[description] = match[1]
	}
	require.Regexp(t, "(?m)^BootCurrent: "+numbers["ota B"]+"$", out)
	order := regexp.MustCompile("(?m)^BootOrder: (.*)$").FindString(out)
	require.Regexp(t, "^BootOrder: "+numbers["ota B"], order)
	require.NotContains(t, order, numbers["ota A"])
	require.NotContains(t, out, "BootNext")
	require.Contains(t, m.tool("efivar", "-l"), efi.Global+"-BootOrder\n")

	m.tool("efibootmgr", "-C", "-d", "/dev/vda", "-p", "3", "-L", "theirs", "-l", `\vmlinuz`, "-u", "quiet")
	m.tool("efibootmgr", "-n", numbers["ota A"])
	m.off()
	m = b.power()
	m.ready(0, "v1")
	m.off()
	var theirs [][]byte
	for name, v := range readVariables(t, b.read(b.vars)) {
		if o, err := efi.ParseLoadOption(v); err == nil && strings.HasPrefix(name, "Boot0") && o.Description == "theirs" {
			again, err := o.Bytes()
			require.NoError(t, err)
			require.Equal(t, v, again)
			theirs = append(theirs, v)
		}
	}
	// The tool leaves out the zero that ends the command line.
	want := b.option(3, "theirs", "quiet")
	require.Equal(t, [][]byte{want[:len(want)-2]}, theirs)
}

// Layout of a store of authenticated variables (tianocore/edk2,
// MdeModulePkg/Include/Guid/VariableFormat.h).
const (
	storeHeader    = 0x48 // of OVMF's firmware volume; then comes the store's own
	firstVariable  = storeHeader + 28
	variableHeader = 60
)

// variableStore makes an empty store of the firmware with variables: names and
// contents in turn. A name without "-" and a vendor is one of UEFI's own.
func (f *factory) variableStore(vars ...any) (path string) {
	f.t.Helper()
	b := f.read(ovmfVars)
	require.Equal(f.t, uint32(0xffffffff), binary.LittleEndian.Uint32(b[firstVariable:]), "the store is not empty")
	off := firstVariable
	le := binary.LittleEndian
	for i := 0; i < len(vars); i += 2 {
		text, vendor, ok := strings.Cut(vars[i].(string), "-")
		if !ok {
			vendor = efi.Global
		}
		guid, err := efi.ParseGUID(vendor)
		require.NoError(f.t, err)
		name, data := efi.EncodeString(text), vars[i+1].([]byte)
		v := make([]byte, variableHeader, variableHeader+len(name)+len(data))
		le.PutUint16(v, 0x55aa)
		v[2] = 0x3f // added
		le.PutUint32(v[4:], efi.Stored)
		le.PutUint32(v[36:], uint32(len(name)))
		le.PutUint32(v[40:], uint32(len(data)))
		copy(v[44:], guid[:])
		v = append(append(v, name...), data...)
		off += copy(b[off:], v)
		off = (off + 3) &^ 3
	}
	path = f.path("vars.fd")
	require.NoError(f.t, os.WriteFile(path, b, 0o600))
	return path
}

// readVariables returns the variables of a store.
func readVariables(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	m := map[string][]byte{}
	le := binary.LittleEndian
	end := storeHeader + int(le.Uint32(b[storeHeader+16:]))
	for off := firstVariable; off+variableHeader <= end && le.Uint16(b[off:]) == 0x55aa; {
		state, names, datas := b[off+2], int(le.Uint32(b[off+36:])), int(le.Uint32(b[off+40:]))
		name := b[off+variableHeader:][:names]
		data := b[off+variableHeader+names:][:datas]
		if state == 0x3f { // added, and not deleted since
			m[efi.DecodeString(name)] = bytes.Clone(data)
		}
		off = (off + variableHeader + names + datas + 3) &^ 3
	}
	return m
}

// Sizes of the files that are the parts of a slot where a loader wants files.
const (
	kernelFile = 16 * mib
	initrdFile = 12 * mib
)

// fileParts makes the parts of such a slot.
func fileParts(kernel, initramfs []byte) map[string][]byte {
	pad := func(b []byte, n int) []byte { return append(bytes.Clone(b), make([]byte, n-len(b))...) }
	return map[string][]byte{"kernel": pad(kernel, kernelFile), "initrd": pad(initramfs, initrdFile)}
}

// slotFiles are the files of a slot below dir. Those of one that is empty are there,
// too.
func slotFiles(dir string, img *image) []file {
	parts := fileParts(nil, nil)
	if img != nil {
		parts = img.parts
	}
	var fs []file
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		fs = append(fs, file{path.Join(dir, name), parts[name]})
	}
	return fs
}

// systemdLoader is Debian's systemd-boot.
const systemdLoader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"

// systemdBoard makes a PC with systemd-boot, whose EFI system partition has these
// files beside the loader's.
func systemdBoard(d *device, vars string, files ...file) (esp string) {
	d.refuses, d.resets = `Error|error|failed`, true
	disk := d.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "esp", size: 80 * mib, kind: "ef00", data: d.fat(append([]file{
			{"/EFI/BOOT/BOOTX64.EFI", d.read(systemdLoader)},
			{"/loader/loader.conf", []byte("timeout 0\n")},
		}, files...)...)},
	})
	d.power = func() *machine { return powerEFI(d.t, vars, disk, "-machine", "q35") }
	return fmt.Sprintf("%s@@%d", disk, 2*mib)
}

// bootEntry is a boot menu entry of type 1.
func bootEntry(slot, loader string) []byte {
	return fmt.Appendf(nil, "title ota %s\nsort-key ota\nversion 1\nlinux /ota/%[1]s/kernel\ninitrd /ota/%[1]s/initrd\noptions %s ota.loader=%s\n", slot, qemu.PC, loader)
}

// counted checks the names of the entries in dir: that of a trial has one try, that
// which is committed no counters.
func counted(d *device, esp, dir, ext string) func(slot int, trial bool) {
	return func(slot int, trial bool) {
		d.t.Helper()
		list := strings.Fields(run(d.t, "mdir", "-b", "-i", esp, "::"+dir))
		require.Len(d.t, list, 2)
		name := "::" + dir + "/ota-" + string(rune('a'+slot))
		if trial {
			name += "+1"
		}
		require.Contains(d.t, list, name+ext)
	}
}

// TestSystemdBoot: systemd-boot with boot counting. The parts of a slot are files on
// the EFI system partition.
func TestSystemdBoot(t *testing.T) {
	tools := maps.Clone(efiTools)
	tools[systemdLoader] = "systemd-boot-efi"
	needs(t, true, tools)
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	f.parts = fileParts
	d := &device{factory: f, v1: f.image("v1", "", nil)}
	const loader, entries = "systemd-boot", "/loader/entries"
	esp := systemdBoard(d, f.variableStore(), slices.Concat(slotFiles("/ota/a", d.v1), slotFiles("/ota/b", nil), []file{
		{entries + "/ota-a.conf", bootEntry("a", loader)},
		{entries + "/ota-b+0.conf", bootEntry("b", loader)},
	})...)
	names := counted(d, esp, entries, ".conf")
	d.selected = func(slot int, trial bool) {
		t.Helper()
		names(slot, trial)
		for _, name := range strings.Fields(run(t, "mdir", "-b", "-i", esp, "::"+entries)) {
			slot, _, _ := strings.Cut(path.Base(name)[len("ota-"):], ".")
			require.Equal(t, string(bootEntry(slot[:1], loader)), run(t, "mtype", "-i", esp, name), name)
		}
	}
	d.test()
}

// TestOneShot: systemd-boot with LoaderEntryDefault and LoaderEntryOneShot.
func TestOneShot(t *testing.T) {
	tools := maps.Clone(efiTools)
	tools[systemdLoader] = "systemd-boot-efi"
	needs(t, true, tools)
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	f.parts = fileParts
	d := &device{factory: f, v1: f.image("v1", "", nil)}
	vars := f.variableStore("LoaderEntryDefault-"+efi.Loader, efi.EncodeString("ota-a.conf"))
	const loader, entries = "one-shot", "/loader/entries"
	systemdBoard(d, vars, slices.Concat(slotFiles("/ota/a", d.v1), slotFiles("/ota/b", nil), []file{
		{entries + "/ota-a.conf", bootEntry("a", loader)},
		{entries + "/ota-b.conf", bootEntry("b", loader)},
	})...)
	d.selected = func(slot int, trial bool) {
		t.Helper()
		got := readVariables(t, f.read(vars))
		always, once := slot, ""
		if trial {
			always, once = 1-slot, fmt.Sprintf("ota-%c.conf", 'a'+slot)
		}
		require.Equal(t, fmt.Sprintf("ota-%c.conf", 'a'+always), efi.DecodeString(got["LoaderEntryDefault"]))
		require.Equal(t, once, efi.DecodeString(got["LoaderEntryOneShot"]))
	}
	d.test()
}

// TestUKI: systemd-boot with boot counting, where the one part of a slot is a unified
// kernel image.
func TestUKI(t *testing.T) {
	const (
		stub    = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
		objcopy = "x86_64-linux-gnu-objcopy"
		size    = 32 * mib
		dir     = "/EFI/Linux"
	)
	tools := maps.Clone(efiTools)
	tools[systemdLoader], tools[stub], tools[objcopy] = "systemd-boot-efi", "systemd-boot-efi", "binutils-x86-64-linux-gnu"
	needs(t, true, tools)
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	f.parts = func(kernel, initramfs []byte) map[string][]byte {
		image := make([]byte, size)
		if kernel != nil {
			// Places in memory, in an order that the stub wants (systemd,
			// docs/UNIFIED_KERNEL_IMAGE.md), without overlap.
			args := []string{stub, f.path("uki.efi")}
			for _, s := range []struct {
				name  string
				place int
				data  []byte
			}{
				{".osrel", 0x20000, []byte("ID=ota\nPRETTY_NAME=ota\nVERSION_ID=1\n")},
				{".cmdline", 0x30000, []byte(qemu.PC + " ota.loader=uki")},
				{".linux", 0x2000000, kernel},
				{".initrd", 0x4000000, initramfs},
			} {
				name := f.path("uki" + s.name)
				require.NoError(t, os.WriteFile(name, s.data, 0o600))
				args = append(args, "--add-section", s.name+"="+name, "--change-section-vma", fmt.Sprintf("%s=%#x", s.name, s.place))
			}
			run(t, objcopy, args...)
			b := f.read(f.path("uki.efi"))
			require.LessOrEqual(t, len(b), size)
			copy(image, b)
		}
		return map[string][]byte{"uki": image}
	}
	d := &device{factory: f, v1: f.image("v1", "", nil)}
	esp := systemdBoard(d, f.variableStore(),
		file{dir + "/ota-a.efi", d.v1.parts["uki"]},
		file{dir + "/ota-b+0.efi", make([]byte, size)})
	d.selected = counted(d, esp, dir, ".efi")
	d.test()
}

// TestBootGuard: EFI Boot Guard, whose watchdog ends everything. The parts of a slot
// are files on its config partition.
func TestBootGuard(t *testing.T) {
	const loader = "/usr/lib/x86_64-linux-gnu/efibootguard/efibootguardx64.efi"
	tools := maps.Clone(efiTools)
	tools[loader], tools["bg_printenv"] = "efibootguard", "efibootguard"
	needs(t, true, tools)
	f := newFactory(t, findKernel(t, "amd64-generic"), append([]string{"i6300esb"}, efiModules...)...)
	f.parts = fileParts
	d := &device{factory: f, v1: f.image("v1", "", nil), armed: true}
	// watchdog is what the loader sets, in seconds: on a busy host long enough to
	// come up.
	config := func(slot string, revision, watchdog int, img *image) []byte {
		env := f.path("BGENV.DAT")
		os.Remove(env)
		run(t, "bg_setenv", "-f", env, "-r", fmt.Sprint(revision), "-s", "0", "-w", fmt.Sprint(watchdog), "--kernel=C:KERNEL-"+slot+":kernel",
			"--args="+qemu.PC+" initrd=\\initrd ota.loader=efibootguard ota.slot="+slot)
		label := efi.EncodeString("KERNEL-" + slot)
		return f.fat(append(slotFiles("/", img), file{"/EFILABEL", label[:len(label)-2]}, file{"/BGENV.DAT", f.read(env)})...)
	}
	const size = 32 * mib
	disk := f.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "esp", size: 2 * mib, kind: "ef00", data: f.fat(file{"/EFI/BOOT/BOOTX64.EFI", f.read(loader)})},
		{name: "config-a", size: size, kind: "0700", data: config("A", 2, 900, d.v1)},
		{name: "config-b", size: size, kind: "0700", data: config("B", 1, 240, nil)},
	})
	vars := f.variableStore()
	d.power = func() *machine {
		return powerEFI(t, vars, disk, "-machine", "pc", "-device", "i6300esb", "-watchdog-action", "reset")
	}
	d.selected = func(slot int, trial bool) {
		t.Helper()
		var revision [2]int
		var state [2]string
		for i := range revision {
			env := f.path("seen.env")
			run(t, "mcopy", "-n", "-o", "-i", fmt.Sprintf("%s@@%d", disk, 4*mib+i*size), "::/BGENV.DAT", env)
			for line := range strings.Lines(run(t, "bg_printenv", "-f", env)) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
				switch value = strings.TrimSpace(value); name {
				case "revision":
					_, err := fmt.Sscan(value, &revision[i])
					require.NoError(t, err)
				case "ustate":
					state[i] = value
				}
			}
		}
		require.Greater(t, revision[slot], revision[1-slot])
		if trial {
			require.Contains(t, state[slot], "INSTALLED")
		} else {
			require.Contains(t, state[slot], "OK")
		}
	}
	d.test()
}
