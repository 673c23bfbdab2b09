// Package detect finds out which boot loader a Linux machine runs, and explains
// what it found. It only reads: files of proc and sys, configuration, and the files
// that boot loaders keep their state in.
package detect

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// Confidence says how sure a [Loader] is.
type Confidence int

// The confidences.
const (
	Possible Confidence = iota // a file that it would use is there
	Likely                     // it is configured
	Certain                    // it has said itself that it started this system
)

// String returns a word for c.
func (c Confidence) String() string {
	switch c {
	case Possible:
		return "possible"
	case Likely:
		return "likely"
	case Certain:
		return "certain"
	}
	return "?"
}

// MarshalText implements encoding.TextMarshaler.
func (c Confidence) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Loader is a boot loader that this machine may run.
type Loader struct {
	// Name is that for people: "U-Boot", "GRUB", "systemd-boot", "EFI Boot Guard",
	// "UEFI", "Raspberry Pi", "barebox", "Android".
	Name string `json:"name"`
	// Scheme is whose boot scripts choose the slot, as far as their variables tell:
	// "RAUC", "Mender", "SWUpdate", "bootcount", or "".
	Scheme     string     `json:"scheme,omitempty"`
	Confidence Confidence `json:"confidence"`
	// Package drives it, as a path inside this module; "" if none does.
	Package string `json:"package,omitempty"`
	// Evidence are sentences: where what was found, and what it means.
	Evidence []string `json:"evidence"`
	// Copies is how many copies of its environment the loader keeps, as far as is
	// known; see driver.Capabilities.
	Copies int `json:"copies,omitempty"`
	// Files are what the driver needs to be told: paths inside root.
	Files []string `json:"files,omitempty"`
}

// Report is what was found.
type Report struct {
	// Loaders come in the order of confidence. UEFI firmware with a loader in
	// between is the last.
	Loaders []Loader `json:"loaders"`
	// Slot is what the kernel was told about the slot that runs: a parameter of
	// its command line with its value, such as "rauc.slot=A"; "" if nothing.
	Slot string `json:"slot,omitempty"`
	// Root is the parameter that names the root file system, "" if there is none.
	Root string `json:"root,omitempty"`
	// Notes are sentences about what else matters.
	Notes []string `json:"notes,omitempty"`
}

// Names of loaders.
const (
	uboot       = "U-Boot"
	grub        = "GRUB"
	systemdBoot = "systemd-boot"
	bootGuard   = "EFI Boot Guard"
	uefi        = "UEFI"
	raspberry   = "Raspberry Pi"
	barebox     = "barebox"
	android     = "Android"
)

// packages drive loaders.
var packages = map[string]string{
	uboot: "boot/uboot", grub: "boot/grub", systemdBoot: "boot/systemdboot", bootGuard: "boot/efibootguard",
	uefi: "boot/efi", raspberry: "boot/rpi",
}

// Run looks at the system whose files are below root, "" for "/". It finds less
// without the rights to read everything, and then says so in Notes.
func Run(root string) Report {
	if root == "" {
		root = "/"
	}
	d := &detector{root: root}
	d.cmdline()
	d.deviceTree()
	d.rauc()
	d.environment()
	d.efi()
	d.grubenv()
	d.guard()
	d.autoboot()
	slices.SortStableFunc(d.r.Loaders, func(a, b Loader) int {
		if last := cmp.Compare(b2i(a.Name == uefi), b2i(b.Name == uefi)); last != 0 {
			return last
		}
		return cmp.Compare(b.Confidence, a.Confidence)
	})
	switch {
	case len(d.r.Loaders) == 0:
		d.note("No boot loader has left a trace. Is proc mounted, is /boot?")
	case d.r.Slot == "" && d.r.Root == "":
		d.note("The kernel was not told which slot it comes from: let the boot script add ota.slot=NAME to its command line.")
	}
	return d.r
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

type detector struct {
	root string
	r    Report
}

func (d *detector) note(format string, args ...any) {
	d.r.Notes = append(d.r.Notes, fmt.Sprintf(format, args...))
}

// found adds evidence for a loader, and returns it.
func (d *detector) found(name string, c Confidence, format string, args ...any) *Loader {
	i := slices.IndexFunc(d.r.Loaders, func(l Loader) bool { return l.Name == name })
	if i < 0 {
		i = len(d.r.Loaders)
		d.r.Loaders = append(d.r.Loaders, Loader{Name: name, Package: packages[name]})
	}
	l := &d.r.Loaders[i]
	l.Confidence = max(l.Confidence, c)
	l.Evidence = append(l.Evidence, fmt.Sprintf(format, args...))
	return l
}

// maxFile bounds what is read of a file.
const maxFile = 256 << 10

func (d *detector) read(name string) ([]byte, bool) {
	f, err := os.Open(filepath.Join(d.root, filepath.FromSlash(name)))
	if err != nil {
		if os.IsPermission(err) {
			d.note("/%s cannot be read without more rights.", name)
		}
		return nil, false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.IsDir() {
		return nil, false
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	return b, err == nil
}

// glob returns paths inside root, with slashes.
func (d *detector) glob(pattern string) []string {
	names, err := filepath.Glob(filepath.Join(d.root, filepath.FromSlash(pattern)))
	if err != nil {
		return nil
	}
	for i, n := range names {
		if rel, err := filepath.Rel(d.root, n); err == nil {
			names[i] = filepath.ToSlash(rel)
		}
	}
	return names
}

func (d *detector) param(key string) (string, bool) {
	v, err := driver.CmdlineParam(filepath.Join(d.root, "proc", "cmdline"), key)
	return v, err == nil
}

func (d *detector) cmdline() {
	for _, key := range []string{"ota.slot", "rauc.slot", "bootchooser.active", "bootstate.active", "androidboot.slot_suffix"} {
		v, ok := d.param(key)
		if !ok {
			continue
		}
		if d.r.Slot == "" {
			d.r.Slot = key + "=" + v
		}
		switch key {
		case "bootchooser.active", "bootstate.active":
			d.found(barebox, Certain, "The kernel's command line has %s=%s, which its bootchooser adds.", key, ota.Quote(v))
		case "androidboot.slot_suffix":
			d.found(android, Certain, "The kernel's command line has %s=%s.", key, ota.Quote(v))
		}
	}
	if v, ok := d.param("root"); ok {
		d.r.Root = "root=" + v
	}
	if v, ok := d.param("BOOT_IMAGE"); ok {
		d.found(grub, Possible, "The kernel's command line has BOOT_IMAGE=%s, as GRUB and syslinux add it.", ota.Quote(v))
	}
	if _, ok := d.param("panic"); !ok {
		d.note("The kernel's command line has no panic=: see ota selftest -health.")
	}
}

func (d *detector) deviceTree() {
	const chosen = "proc/device-tree/chosen/"
	text := func(b []byte) string { return ota.Quote(string(bytes.TrimRight(b, "\x00"))) }
	if b, ok := d.read(chosen + "u-boot,version"); ok {
		d.found(uboot, Certain, "The device tree has chosen/u-boot,version %s.", text(b))
	}
	if b, ok := d.read(chosen + "bootloader/partition"); ok && len(b) == 4 {
		l := d.found(raspberry, Certain, "The device tree has chosen/bootloader, and partition %d in it: the firmware has started from there.", binary.BigEndian.Uint32(b))
		if b, ok := d.read(chosen + "bootloader/tryboot"); ok && len(b) == 4 && binary.BigEndian.Uint32(b) != 0 {
			l.Evidence = append(l.Evidence, "chosen/bootloader/tryboot is set: this is a trial.")
		}
	}
	if b, ok := d.read("proc/device-tree/model"); ok && bytes.HasPrefix(b, []byte("Raspberry Pi")) {
		d.found(raspberry, Possible, "The device tree is that of %s.", text(b))
	}
	for _, name := range d.glob("sys/bus/nvmem/devices/*/of_node/compatible") {
		if b, ok := d.read(name); ok && bytes.Contains(b, []byte("u-boot,env")) {
			l := d.found(uboot, Likely, "/%s is u-boot,env: the kernel knows where U-Boot's environment is.", name)
			// torvalds/linux, Documentation/devicetree/bindings/nvmem/u-boot,env.yaml
			l.Copies = 1
			if bytes.Contains(b, []byte("u-boot,env-redundant")) {
				l.Copies = 2
			}
		}
	}
}

// rauc reads what RAUC was told; rauc, docs/reference.rst, "system section".
func (d *detector) rauc() {
	for _, name := range []string{"etc/rauc/system.conf", "usr/lib/rauc/system.conf"} {
		b, ok := d.read(name)
		if !ok {
			continue
		}
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			if strings.TrimSpace(key) != "bootloader" {
				continue
			}
			value = strings.TrimSpace(value)
			loader, ok := map[string]string{"uboot": uboot, "grub": grub, "efi": uefi, "barebox": barebox}[value]
			if !ok {
				d.note("/%s says bootloader=%s.", name, ota.Quote(value))
				continue
			}
			d.found(loader, Likely, "/%s says bootloader=%s.", name, value).Scheme = "RAUC"
		}
		return
	}
}

func (d *detector) environment() {
	const name = "etc/fw_env.config"
	b, ok := d.read(name)
	if !ok {
		return
	}
	copies := 0
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if len(strings.Fields(line)) >= 3 {
			copies++
		}
	}
	switch {
	case copies == 0:
		d.note("/%s names no device.", name)
		return
	case copies == 1:
		d.note("U-Boot's environment has one copy: a power cut while it is written loses all of it.")
	}
	l := d.found(uboot, Likely, "/%s names %d copies of U-Boot's environment, for fw_printenv and fw_setenv.", name, min(copies, 2))
	l.Files, l.Copies = append(l.Files, name), min(copies, 2)
	switch {
	case l.Scheme != "":
	case strings.HasPrefix(d.r.Slot, "rauc.slot="):
		l.Scheme = "RAUC"
		l.Evidence = append(l.Evidence, "The boot script tells the kernel "+d.r.Slot+", as RAUC's does.")
	case d.exists("etc/mender") || d.exists("etc/mender/mender.conf"):
		l.Scheme = "Mender"
		l.Evidence = append(l.Evidence, "/etc/mender exists.")
	case d.exists("etc/swupdate.cfg"):
		l.Scheme = "SWUpdate"
		l.Evidence = append(l.Evidence, "/etc/swupdate.cfg exists.")
	default:
		l.Evidence = append(l.Evidence, "Which variables choose the slot, fw_printenv tells: BOOT_ORDER (RAUC), mender_boot_part (Mender), or bootcount and upgrade_available.")
	}
}

func (d *detector) exists(name string) bool {
	_, err := os.Stat(filepath.Join(d.root, filepath.FromSlash(name)))
	return err == nil
}

// GUIDs of EFI variables: of the firmware, and of loaders (systemd,
// docs/BOOT_LOADER_INTERFACE.md).
const (
	efivars    = "sys/firmware/efi/efivars/"
	globalGUID = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	loaderGUID = "-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
)

// efivar returns the text of a variable, after 4 bytes of attributes.
func (d *detector) efivar(name string) (string, bool) {
	b, ok := d.read(efivars + name)
	if !ok || len(b) < 4 {
		return "", false
	}
	var u []uint16
	for b = b[4:]; len(b) >= 2 && (b[0] != 0 || b[1] != 0); b = b[2:] {
		u = append(u, binary.LittleEndian.Uint16(b))
	}
	return string(utf16.Decode(u)), true
}

func (d *detector) efi() {
	if !d.exists("sys/firmware/efi") {
		return
	}
	if b, ok := d.read(efivars + "BootCurrent" + globalGUID); ok && len(b) >= 6 {
		d.found(uefi, Certain, "BootCurrent is %04X: the firmware has started this boot entry, and can try another one by BootNext.", binary.LittleEndian.Uint16(b[4:]))
	} else {
		d.found(uefi, Likely, "/sys/firmware/efi exists, but no variable BootCurrent: is efivarfs mounted?")
	}
	info, ok := d.efivar("LoaderInfo" + loaderGUID)
	if !ok {
		return
	}
	for prefix, name := range map[string]string{"systemd-boot": systemdBoot, "GRUB": grub, "EFI Boot Guard": bootGuard} {
		if !strings.HasPrefix(info, prefix) {
			continue
		}
		l := d.found(name, Certain, "The EFI variable LoaderInfo is %s.", ota.Quote(info))
		if name != systemdBoot {
			continue
		}
		if p, ok := d.efivar("LoaderBootCountPath" + loaderGUID); ok {
			l.Evidence = append(l.Evidence, "LoaderBootCountPath is "+ota.Quote(p)+": this boot is counted.")
		}
		for _, dir := range []string{"efi", "boot/efi", "boot"} {
			if d.exists(dir + "/loader/loader.conf") {
				l.Files = append(l.Files, dir)
			}
		}
	}
	if !slices.ContainsFunc(d.r.Loaders, func(l Loader) bool { return l.Name != uefi && l.Confidence == Certain }) {
		d.note("The EFI variable LoaderInfo is %s, which is not known.", ota.Quote(info))
	}
}

func (d *detector) grubenv() {
	const magic = "# GRUB Environment Block\n"
	for _, pattern := range []string{"boot/grub/grubenv", "boot/grub2/grubenv", "boot/efi/EFI/*/grubenv", "efi/EFI/*/grubenv", "boot/EFI/*/grubenv", "grubenv/grubenv", "boot/efi/grub-mender-grubenv/mender_grubenv1/env"} {
		for _, name := range d.glob(pattern) {
			b, ok := d.read(name)
			if !ok {
				continue
			}
			if !bytes.HasPrefix(b, []byte(magic)) {
				d.note("/%s is no environment block of GRUB.", name)
				continue
			}
			l := d.found(grub, Likely, "/%s is an environment block of %d bytes.", name, len(b))
			l.Files = append(l.Files, name)
			switch {
			case bytes.Contains(b, []byte("\nORDER=")):
				l.Scheme = "RAUC"
				l.Evidence = append(l.Evidence, "It has the variable ORDER, of RAUC's scripts.")
			case bytes.Contains(b, []byte("\nmender_boot_part=")):
				l.Scheme = "Mender"
				l.Evidence = append(l.Evidence, "It has the variable mender_boot_part, of Mender's scripts.")
			}
			if len(b) != 1024 {
				d.note("/%s has %d bytes instead of 1024: GRUB cannot save it.", name, len(b))
			}
		}
	}
}

// guardSize is the size of BGENV.DAT: efibootguard, include/envdata.h.
const guardSize = 132104

func (d *detector) guard() {
	var files []string
	for _, dir := range []string{"boot", "boot/efi", "efi", "mnt/*", "media/*", "boot/*", "run/*"} {
		files = append(files, d.glob(path.Join(dir, "BGENV.DAT"))...)
	}
	slices.Sort(files)
	for _, name := range slices.Compact(files) {
		if info, err := os.Stat(filepath.Join(d.root, filepath.FromSlash(name))); err != nil || info.Size() != guardSize {
			d.note("/%s does not have the %d bytes of EFI Boot Guard's environment.", name, guardSize)
			continue
		}
		l := d.found(bootGuard, Likely, "/%s is an environment of EFI Boot Guard.", name)
		l.Files = append(l.Files, name)
	}
}

func (d *detector) autoboot() {
	for _, name := range []string{"boot/firmware/autoboot.txt", "boot/autoboot.txt"} {
		b, ok := d.read(name)
		if !ok {
			continue
		}
		l := d.found(raspberry, Likely, "/%s tells the firmware of a Raspberry Pi where to start from.", name)
		l.Files = append(l.Files, name)
		if !bytes.Contains(b, []byte("tryboot_a_b=1")) {
			d.note("/%s has no tryboot_a_b=1: a trial loads tryboot.txt instead of another partition.", name)
		}
	}
}
