package qemu_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/boot/efi"
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

// TestBootNext: UEFI firmware that starts the kernel itself.
func TestBootNext(t *testing.T) {
	needs(t, true, efiTools)
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	f.parts = func(kernel, initramfs []byte) map[string][]byte {
		return map[string][]byte{"system": f.fat(file{"/vmlinuz", kernel}, file{"/initrd", initramfs})}
	}
	d := &device{
		factory: f, v1: f.image("v1", "", nil),
		starts:  [2]string{`BdsDxe: starting Boot00A0 `, `BdsDxe: starting Boot.... "ota B"`},
		refuses: `BdsDxe: failed to load Boot.... "ota B"`,
		hangs:   "softdog",
	}
	disk := f.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "system-a", size: 32 * mib, data: d.v1.parts["system"]},
		{name: "system-b", size: 32 * mib},
	})
	// The option of the factory's slot, made by the library on the host.
	h, err := os.Open(disk)
	require.NoError(t, err)
	hd, err := efi.Partition(h, sectorSize, 2)
	h.Close()
	require.NoError(t, err)
	option, err := (&efi.LoadOption{
		Attributes: efi.Active, Description: "ota A", Path: []efi.Node{hd.Node(), efi.FileNode(`\vmlinuz`)},
		Optional: efi.EncodeString("console=ttyS0 panic=1 quiet ota.loader=efi initrd=\\initrd"),
	}).Bytes()
	require.NoError(t, err)
	vars := f.variableStore("Boot00A0", option, "BootOrder", []byte{0xa0, 0})
	d.power = func() *machine { return powerEFI(t, vars, disk, "-machine", "q35") }
	d.selected = func(slot int, trial bool) {
		t.Helper()
		got := readVariables(t, f.read(vars))
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
	d.test()
}

// Layout of a store of authenticated variables (tianocore/edk2,
// MdeModulePkg/Include/Guid/VariableFormat.h).
const (
	storeHeader    = 0x48 // of OVMF's firmware volume; then comes the store's own
	firstVariable  = storeHeader + 28
	variableHeader = 60
)

// variableStore makes an empty store of the firmware with variables of the global
// vendor: names and contents in turn.
func (f *factory) variableStore(vars ...any) (path string) {
	f.t.Helper()
	global, err := efi.ParseGUID(efi.Global)
	require.NoError(f.t, err)
	b := f.read(ovmfVars)
	require.Equal(f.t, uint32(0xffffffff), binary.LittleEndian.Uint32(b[firstVariable:]), "the store is not empty")
	off := firstVariable
	le := binary.LittleEndian
	for i := 0; i < len(vars); i += 2 {
		name, data := efi.EncodeString(vars[i].(string)), vars[i+1].([]byte)
		v := make([]byte, variableHeader, variableHeader+len(name)+len(data))
		le.PutUint16(v, 0x55aa)
		v[2] = 0x3f // added
		le.PutUint32(v[4:], efi.Stored)
		le.PutUint32(v[36:], uint32(len(name)))
		le.PutUint32(v[40:], uint32(len(data)))
		copy(v[44:], global[:])
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

// TestSystemdBoot: systemd-boot with boot counting. The parts of a slot are files on
// the EFI system partition.
func TestSystemdBoot(t *testing.T) {
	const loader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	tools := maps.Clone(efiTools)
	tools[loader] = "systemd-boot-efi"
	needs(t, true, tools)
	f := newFactory(t, findKernel(t, "amd64"), efiModules...)
	f.parts = fileParts
	d := &device{factory: f, v1: f.image("v1", "", nil), refuses: `Error|error|failed`, resets: true, hangs: "softdog"}
	entry := func(slot string) []byte {
		return fmt.Appendf(nil, "title ota %s\nsort-key ota\nversion 1\nlinux /ota/%[1]s/kernel\ninitrd /ota/%[1]s/initrd\noptions console=ttyS0 panic=1 quiet ota.loader=systemd-boot\n", slot)
	}
	files := []file{
		{"/EFI/BOOT/BOOTX64.EFI", f.read(loader)},
		{"/loader/loader.conf", []byte("timeout 0\n")},
		{"/loader/entries/ota-a.conf", entry("a")},
		{"/loader/entries/ota-b+0.conf", entry("b")},
	}
	files = append(files, slotFiles("/ota/a", d.v1)...)
	files = append(files, slotFiles("/ota/b", nil)...)
	disk := f.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "esp", size: 80 * mib, kind: "ef00", data: f.fat(files...)},
	})
	vars := f.variableStore()
	d.power = func() *machine { return powerEFI(t, vars, disk, "-machine", "q35") }
	d.selected = func(slot int, trial bool) {
		t.Helper()
		esp := fmt.Sprintf("%s@@%d", disk, 2*mib)
		list := strings.Fields(run(t, "mdir", "-b", "-i", esp, "::/loader/entries"))
		require.Len(t, list, 2)
		name := "::/loader/entries/ota-" + string(rune('a'+slot))
		if trial {
			name += "+1"
		}
		require.Contains(t, list, name+".conf")
		for _, name := range list {
			slot, _, _ := strings.Cut(path.Base(name)[len("ota-"):], ".")
			require.Equal(t, string(entry(slot[:1])), run(t, "mtype", "-i", esp, name), name)
		}
	}
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
	d := &device{factory: f, v1: f.image("v1", "", nil), hangs: "loader"}
	config := func(slot string, revision int, img *image) []byte {
		env := f.path("BGENV.DAT")
		os.Remove(env)
		run(t, "bg_setenv", "-f", env, "-r", fmt.Sprint(revision), "-s", "0", "-w", "90", "--kernel=C:KERNEL-"+slot+":kernel",
			"--args=console=ttyS0 panic=1 quiet initrd=\\initrd ota.loader=efibootguard ota.slot="+slot)
		label := efi.EncodeString("KERNEL-" + slot)
		return f.fat(append(slotFiles("/", img), file{"/EFILABEL", label[:len(label)-2]}, file{"/BGENV.DAT", f.read(env)})...)
	}
	const size = 32 * mib
	disk := f.disk("disk.img", []part{
		{name: "state", size: mib},
		{name: "esp", size: 2 * mib, kind: "ef00", data: f.fat(file{"/EFI/BOOT/BOOTX64.EFI", f.read(loader)})},
		{name: "config-a", size: size, kind: "0700", data: config("A", 2, d.v1)},
		{name: "config-b", size: size, kind: "0700", data: config("B", 1, nil)},
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
