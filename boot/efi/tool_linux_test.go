package efi_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
)

// tools returns a function that runs Debian's tools on a directory in the place of
// efivarfs, which libefivar can be told to use (rhboot/efivar, src/efivarfs.c).
func tools(t *testing.T, dir string) func(name string, args ...string) string {
	for name, pkg := range map[string]string{"efibootmgr": "efibootmgr", "efivar": "efivar", "sgdisk": "gdisk"} {
		if _, err := exec.LookPath(name); err != nil {
			msg := fmt.Sprintf("%s is not installed: apt-get install %s", name, pkg)
			if os.Getenv("CI") == "true" {
				t.Fatal(msg)
			}
			t.Skip(msg)
		}
	}
	return func(name string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(os.Environ(), "EFIVARFS_PATH="+dir+"/", "LC_ALL=C.UTF-8")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%v: %s", cmd, out)
		return string(out)
	}
}

// shown is how efibootmgr -v prints an option.
func shown(number int, o *efi.LoadOption) string {
	active := " "
	if o.Attributes&efi.Active != 0 {
		active = "*"
	}
	var path []string
	for _, n := range o.Path {
		path = append(path, n.String())
	}
	data := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, string(o.Optional))
	return fmt.Sprintf("Boot%04X%s %s\t%s%s\n", number, active, o.Description, strings.Join(path, "/"), data)
}

// TestToolsDriver: what the driver has done, efibootmgr shows.
func TestToolsDriver(t *testing.T) {
	dir := t.TempDir()
	run := tools(t, dir)
	vars := efi.Efivarfs{Root: dir}
	d, err := efi.New(&efi.Config{Slots: slots(), Vars: vars, Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	for _, tc := range []struct {
		c           driver.Choice
		order, next string
	}{
		{driver.Choice{Active: 0, Revert: ota.NoSlot}, "Acme A", ""},
		{driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}, "Acme A", "Acme B"},
		{driver.Choice{Active: 1, Revert: ota.NoSlot}, "Acme B", ""},
	} {
		require.NoError(t, d.Write(t.Context(), tc.c))
		out := run("efibootmgr", "-v")
		name := func(field string) string {
			m := regexp.MustCompile(`(?m)^` + field + `: ([0-9A-F]{4})`).FindStringSubmatch(out)
			if m == nil {
				return ""
			}
			name := regexp.MustCompile(`(?m)^Boot` + m[1] + `\* (.*)\t`).FindStringSubmatch(out)
			require.NotNil(t, name, out)
			return name[1]
		}
		require.Equal(t, tc.order, name("BootOrder"), out)
		require.Equal(t, tc.next, name("BootNext"), out)
		for i, s := range slots() {
			if ota.SlotID(i) > tc.c.Active {
				break // it has not been chosen so far
			}
			o := &efi.LoadOption{Attributes: efi.Active, Description: s.Description, Path: []efi.Node{part.Node(), efi.FileNode(s.File)}}
			if s.Cmdline != "" {
				o.Optional = efi.EncodeString(s.Cmdline)
			}
			require.Regexp(t, `(?m)^Boot....`+regexp.QuoteMeta(strings.TrimSuffix(shown(0, o), "\n")[len("Boot0000"):])+`$`, out)
		}
	}
}

// TestToolsRead: efibootmgr and efivar read any option.
func TestToolsRead(t *testing.T) {
	dir := t.TempDir()
	run := tools(t, dir)
	vars := efi.Efivarfs{Root: dir}
	rnd := rand.New(rand.NewPCG(7, 8))
	require.NoError(t, vars.Set(bootOrder, efi.Stored, u16(0xbeef, 1)))
	want := "BootOrder: BEEF,0001\n"
	for number := range 24 {
		h := efi.HardDrive{Number: 1 + rnd.Uint32N(128), Start: rnd.Uint64(), Size: rnd.Uint64()}
		binary.LittleEndian.PutUint64(h.GUID[:], rnd.Uint64())
		binary.LittleEndian.PutUint64(h.GUID[8:], rnd.Uint64())
		o := &efi.LoadOption{
			Attributes: rnd.Uint32N(2), Description: "x" + strings.Repeat("ä€ ota", rnd.IntN(4)),
			Path: []efi.Node{h.Node(), efi.FileNode("/" + strings.Repeat("dir/", rnd.IntN(3)) + "vmlinuz")},
		}
		if n := rnd.IntN(30); n > 0 {
			o.Optional = efi.EncodeString(strings.Repeat("quiet ", n))
		}
		b, err := o.Bytes()
		require.NoError(t, err)
		number := number * 0x0107
		name := fmt.Sprintf("Boot%04X-", number)
		require.NoError(t, vars.Set(name+efi.Global, efi.Stored, b))
		want += shown(number, o)
		var got []byte
		for text := range strings.FieldsSeq(run("efivar", "-d", "-n", efi.Global+"-"+strings.TrimSuffix(name, "-"))) {
			n, err := strconv.ParseUint(text, 10, 8)
			require.NoError(t, err)
			got = append(got, byte(n))
		}
		require.Equal(t, b, got)
	}
	require.Equal(t, want, run("efibootmgr", "-v"))
	names, err := vars.List()
	require.NoError(t, err)
	var theirs []string
	for name := range strings.FieldsSeq(run("efivar", "-l")) {
		const guid = len(efi.Global)
		theirs = append(theirs, name[guid+1:]+"-"+name[:guid])
	}
	require.ElementsMatch(t, names, theirs)
}

// TestToolsWrite: what efibootmgr and efivar write is read.
func TestToolsWrite(t *testing.T) {
	dir := t.TempDir()
	run := tools(t, dir)
	vars := efi.Efivarfs{Root: dir}
	for i := range 3 {
		b, err := (&efi.LoadOption{Description: "x", Path: []efi.Node{part.Node()}}).Bytes()
		require.NoError(t, err)
		require.NoError(t, vars.Set(fmt.Sprintf("Boot%04X-", i)+efi.Global, efi.Stored, b))
	}
	has := func(name string, want []byte) {
		t.Helper()
		attrs, got, err := vars.Get(name)
		require.NoError(t, err)
		require.Equal(t, uint32(efi.Stored), attrs)
		require.Equal(t, want, got)
	}
	run("efibootmgr", "-o", "2,0,1")
	has(bootOrder, u16(2, 0, 1))
	run("efibootmgr", "-n", "1")
	has(bootNext, u16(1))
	run("efibootmgr", "-N")
	_, _, err := vars.Get(bootNext)
	require.ErrorIs(t, err, fs.ErrNotExist)
	run("efibootmgr", "-b", "1", "-a")
	_, b, err := vars.Get("Boot0001-" + efi.Global)
	require.NoError(t, err)
	o, err := efi.ParseLoadOption(b)
	require.NoError(t, err)
	require.Equal(t, uint32(efi.Active), o.Attributes)

	data := filepath.Join(t.TempDir(), "data")
	require.NoError(t, os.WriteFile(data, efi.EncodeString("ota-b.conf"), 0o600))
	run("efivar", "-w", "-n", efi.Loader+"-LoaderEntryOneShot", "-f", data)
	_, b, err = vars.Get("LoaderEntryOneShot-" + efi.Loader)
	require.NoError(t, err)
	require.Equal(t, "ota-b.conf", efi.DecodeString(b))
}

// TestToolsCreate: efibootmgr makes the option that is made here, for a partition of
// a disk.
func TestToolsCreate(t *testing.T) {
	dir := t.TempDir()
	run := tools(t, dir)
	if os.Geteuid() != 0 {
		t.Skip("needs root for a loop device; interop/qemu does the same in a virtual machine")
	}
	img := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, 4<<20))
	run("sgdisk", "-n", "1:2048:4095", "-n", "2:4096:6143", img)
	out, err := exec.CommandContext(t.Context(), "losetup", "--find", "--show", "--partscan", img).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device to be had: %v %s; interop/qemu does the same in a virtual machine", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v %s", dev, err, out)
		}
	})
	disk, err := os.Open(dev)
	require.NoError(t, err)
	defer disk.Close()
	h, err := efi.Partition(disk, 0, 2)
	require.NoError(t, err)
	run("efibootmgr", "-C", "-d", dev, "-p", "2", "-L", "Acme B", "-l", `\b\vmlinuz`, "-u", "quiet root=/dev/x")
	_, got, err := efi.Efivarfs{Root: dir}.Get("Boot0000-" + efi.Global)
	require.NoError(t, err)
	line := efi.EncodeString("quiet root=/dev/x")
	want, err := (&efi.LoadOption{
		Attributes: efi.Active, Description: "Acme B", Path: []efi.Node{h.Node(), efi.FileNode(`\b\vmlinuz`)},
		Optional: line[:len(line)-2], // the tool leaves out the zero
	}).Bytes()
	require.NoError(t, err)
	require.Equal(t, want, got)
}
