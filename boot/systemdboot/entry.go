package systemdboot

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/fsys"
)

// ErrFormat says that a file is not the boot menu entry that it should be. It is
// wrapped with what and where.
var ErrFormat = errors.New("malformed boot menu entry")

// The directories that hold entries, and the suffix of those that count.
const (
	type1Dir, type1Ext = "/loader/entries", ".conf"
	type2Dir, type2Ext = "/EFI/Linux", ".efi"
)

// Name is the name of an entry's file: Base, then "+Left" or "+Left-Done", then Ext.
type Name struct {
	Base, Ext string
	// Counted says that the name has counters: Left boots are left, and the
	// entry is bad if that is 0; Done are done.
	Counted    bool
	Left, Done int
}

// ParseName takes a file name apart (systemd, src/boot/efi/boot.c,
// config_entry_parse_tries). What does not look like counters is part of the base.
func ParseName(file string) Name {
	n := Name{Base: file, Ext: path.Ext(file)}
	n.Base = strings.TrimSuffix(file, n.Ext)
	base, counters, ok := cutLast(n.Base, "+")
	if !ok {
		return n
	}
	l, d, two := strings.Cut(counters, "-")
	left, ok := counter(l)
	done := 0
	if ok && two {
		done, ok = counter(d)
	}
	if ok {
		n.Base, n.Counted, n.Left, n.Done = base, true, left, done
	}
	return n
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func counter(s string) (n int, ok bool) {
	v, err := strconv.ParseUint(s, 10, 31)
	return int(v), err == nil && v <= math.MaxInt32
}

// String is the inverse of [ParseName]. "-0" is left out.
func (n Name) String() string {
	switch {
	case !n.Counted:
		return n.Base + n.Ext
	case n.Done == 0:
		return fmt.Sprintf("%s+%d%s", n.Base, n.Left, n.Ext)
	}
	return fmt.Sprintf("%s+%d-%d%s", n.Base, n.Left, n.Done, n.Ext)
}

// bad reports whether the loader prefers all other entries.
func (n Name) bad() bool { return n.Counted && n.Left == 0 }

// booted returns the name after the loader has started the entry.
func (n Name) booted() Name {
	if n.Counted {
		n.Left, n.Done = max(n.Left-1, 0), n.Done+1
	}
	return n
}

// entry is an entry as the loader sees it.
type entry struct {
	name                      Name
	dir, file                 string
	broken                    bool // the loader does not show it
	keyed                     bool // it has a sort key
	sortKey, machine, version string
	slot                      ota.SlotID
}

// compare sorts as the loader does (systemd, src/boot/efi/boot.c,
// config_entry_compare).
func compare(a, b *entry) int {
	boolean := func(a, b bool) int {
		switch {
		case a == b:
			return 0
		case b:
			return -1
		}
		return 1
	}
	c := cmp.Or(boolean(a.broken, b.broken), boolean(a.name.bad(), b.name.bad()), boolean(!a.keyed, !b.keyed))
	if c == 0 && a.keyed {
		c = cmp.Or(cmp.Compare(a.sortKey, b.sortKey), cmp.Compare(a.machine, b.machine), -compareVersions(a.version, b.version))
	}
	c = cmp.Or(c, -compareVersions(a.id(), b.id()))
	if c == 0 && a.name.Counted && b.name.Counted {
		c = cmp.Or(-cmp.Compare(a.name.Left, b.name.Left), cmp.Compare(a.name.Done, b.name.Done))
	}
	return c
}

// id is what the variables call the entry. Some versions of the loader leave the
// counters in it, which makes no difference to how slots are sorted.
func (e *entry) id() string { return strings.ToLower(e.name.Base + e.name.Ext) }

// compareVersions compares version strings as the loader does: segments of digits or
// letters, with "~" before, and "-", "^", "." as ever weaker separators (systemd,
// src/fundamental/string-util-fundamental.c, strverscmp_improved; the Version Format
// Specification of the UAPI group).
func compareVersions(a, b string) int {
	invalid := func(r rune) bool {
		return !digit(byte(r)) && !letter(byte(r)) && !strings.ContainsRune("~-^.", r) || r > 0x7f
	}
	for {
		a, b = strings.TrimLeftFunc(a, invalid), strings.TrimLeftFunc(b, invalid)
		if c, done := separator(&a, &b, '~'); done {
			return c
		}
		if a == "" || b == "" {
			return cmp.Compare(len(a), len(b))
		}
		for _, sep := range []byte("-^.") {
			if c, done := separator(&a, &b, sep); done {
				return c
			}
		}
		var sa, sb string
		if a != "" && digit(a[0]) || b != "" && digit(b[0]) {
			sa, a = cutWhile(a, digit)
			sb, b = cutWhile(b, digit)
			if (sa == "") != (sb == "") {
				return cmp.Compare(len(sa), len(sb))
			}
			sa, sb = strings.TrimLeft(sa, "0"), strings.TrimLeft(sb, "0")
			if c := cmp.Or(cmp.Compare(len(sa), len(sb)), cmp.Compare(sa, sb)); c != 0 {
				return c
			}
			continue
		}
		sa, a = cutWhile(a, letter)
		sb, b = cutWhile(b, letter)
		if c := cmp.Compare(sa, sb); c != 0 {
			return c
		}
	}
}

// separator removes sep from the start of both strings. If only one has it that one
// is older.
func separator(a, b *string, sep byte) (c int, done bool) {
	ra, oka := strings.CutPrefix(*a, string(sep))
	rb, okb := strings.CutPrefix(*b, string(sep))
	switch {
	case oka && !okb:
		return -1, true
	case okb && !oka:
		return 1, true
	}
	*a, *b = ra, rb
	return 0, false
}

func digit(c byte) bool  { return c >= '0' && c <= '9' }
func letter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

func cutWhile(s string, f func(byte) bool) (string, string) {
	n := 0
	for n < len(s) && f(s[n]) {
		n++
	}
	return s[:n], s[n:]
}

// readEntry reads what the loader sorts by.
func readEntry(files fsys.FS, dir, file string) (*entry, error) {
	e := &entry{name: ParseName(file), dir: dir, file: file, broken: true, slot: ota.NoSlot}
	var err error
	var text []byte
	if dir == type1Dir {
		text, err = files.ReadFile(path.Join(dir, file))
	} else {
		text, err = readRelease(files, path.Join(dir, file))
	}
	switch {
	case errors.Is(err, ErrFormat) || errors.Is(err, ota.ErrTooLarge):
		return e, nil
	case err != nil:
		return e, err
	}
	if dir == type1Dir {
		for key, value := range pairs(text, " \t") {
			switch key {
			case "sort-key":
				e.sortKey, e.keyed = value, true
			case "machine-id":
				e.machine = value
			case "version":
				e.version = value
			case "linux", "efi", "uki":
				e.broken = false
			}
		}
		return e, nil
	}
	v := map[string]string{}
	for key, value := range pairs(text, "=") {
		v[key] = value
	}
	first := func(keys ...string) (string, bool) {
		for _, k := range keys {
			if s, ok := v[k]; ok {
				return s, true
			}
		}
		return "", false
	}
	// systemd, src/fundamental/bootspec-fundamental.c
	e.sortKey, e.keyed = first("IMAGE_ID", "ID")
	e.version, _ = first("IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID")
	_, ok := first("PRETTY_NAME", "IMAGE_ID", "NAME", "ID")
	e.broken = !ok
	return e, nil
}

// pairs yields the lines "key value" of a text, without quotes around the value.
func pairs(text []byte, sep string) func(func(key, value string) bool) {
	return func(yield func(string, string) bool) {
		for line := range strings.FieldsFuncSeq(string(text), func(r rune) bool { return r == '\n' || r == '\r' || r == 0 }) {
			line = strings.Trim(line, " \t")
			if strings.HasPrefix(line, "#") {
				continue
			}
			i := strings.IndexAny(line, sep)
			if i < 0 {
				continue
			}
			value := strings.TrimLeft(line[i:], sep)
			if len(value) >= 2 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
				value = value[1 : len(value)-1]
			}
			if !yield(line[:i], value) {
				return
			}
		}
	}
}

// maxRelease bounds the section .osrel of an image.
const maxRelease = 64 << 10

// readRelease returns the os-release text of a unified kernel image.
func readRelease(files fsys.FS, name string) ([]byte, error) {
	f, err := files.Open(name)
	if err != nil {
		return nil, err
	}
	b, err := release(f)
	if err != nil && !errors.Is(err, ErrFormat) {
		err = fmt.Errorf("%s: %w", ota.Quote(name), err)
	}
	return b, errors.Join(err, f.Close())
}

// release returns the section .osrel of a PE image (Microsoft, PE Format: MS-DOS
// stub, COFF file header, section table).
func release(f io.ReaderAt) ([]byte, error) {
	read := func(off int64, n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := f.ReadAt(b, off)
		if err == io.EOF {
			err = fmt.Errorf("image ends before byte %d: %w", off+int64(n), ErrFormat)
		}
		return b, err
	}
	le := binary.LittleEndian
	b, err := read(0, 64)
	if err != nil {
		return nil, err
	}
	if string(b[:2]) != "MZ" {
		return nil, fmt.Errorf("not a PE image: %w", ErrFormat)
	}
	at := int64(le.Uint32(b[60:]))
	if b, err = read(at, 24); err != nil {
		return nil, err
	}
	if string(b[:4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("not a PE image: %w", ErrFormat)
	}
	n := int(le.Uint16(b[6:]))
	at += 24 + int64(le.Uint16(b[20:]))
	if b, err = read(at, 40*n); err != nil {
		return nil, err
	}
	for s := range slices.Chunk(b, 40) {
		if string(s[:8]) != ".osrel\x00\x00" {
			continue
		}
		// The size in memory; that in the file is rounded up.
		size := min(le.Uint32(s[8:]), le.Uint32(s[16:]))
		if size > maxRelease {
			return nil, fmt.Errorf("section .osrel of %d bytes: %w", size, ErrFormat)
		}
		text, err := read(int64(le.Uint32(s[20:])), int(size))
		return bytes.TrimRight(text, "\x00"), err
	}
	return nil, fmt.Errorf("no section .osrel: %w", ErrFormat)
}
