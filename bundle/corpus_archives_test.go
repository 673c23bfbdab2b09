package bundle_test

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// small returns an archive like that of good, but with fewer bytes.
func small() *archive {
	return &archive{entries: []entry{
		{name: "manifest.json", data: manifestOf("a.bin", "AAA", "b.bin", "BB")},
		{name: "a.bin", data: "AAA"},
		{name: "b.bin", data: "BB"},
	}}
}

// manifestOf describes files, given as names and contents in turn.
func manifestOf(files ...string) string {
	var b strings.Builder
	for i := 0; i < len(files); i += 2 {
		fmt.Fprintf(&b, `,"%c":{"src":%s,"size":%d,"cs_sha256":%q}`, 'a'+i/2, quoted(files[i]), len(files[i+1]), sum256(files[i+1]))
	}
	return `{"parts":{` + b.String()[1:] + `}}`
}

func quoted(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}

// alter adds a change of a header to those there are.
func alter(old *func([]byte), f func([]byte)) {
	first := *old
	*old = func(h []byte) {
		if first != nil {
			first(h)
		}
		f(h)
	}
}

func (e *entry) onLocal(f func([]byte))   { alter(&e.local, f) }
func (e *entry) onCentral(f func([]byte)) { alter(&e.central, f) }

func (a *archive) onEnd(f func([]byte) []byte) {
	first := a.end
	a.end = func(b []byte) []byte {
		if first != nil {
			b = first(b)
		}
		return f(b)
	}
}

// variant is one form of one of the classes in which parsers of zip files
// disagree (ZipDiff, USENIX Security 2025: A1 to C5).
type variant struct {
	class, name string
	want        string // "" = accepted
	do          func(a *archive)
}

// variants change an archive of small in one way. Those of class A and B act on
// its second entry.
func variants() (vs []variant) {
	add := func(class, name, want string, do func(a *archive)) {
		vs = append(vs, variant{class, name, want, do})
	}
	local := func(f func([]byte)) func(*archive) { return func(a *archive) { a.entries[1].onLocal(f) } }
	central := func(f func([]byte)) func(*archive) { return func(a *archive) { a.entries[1].onCentral(f) } }
	both16 := func(off int, v uint16) func(*archive) {
		return func(a *archive) { a.entries[1].onLocal(put16(off, v)); a.entries[1].onCentral(put16(off+2, v)) }
	}
	both32 := func(off int, v uint32) func(*archive) {
		return func(a *archive) { a.entries[1].onLocal(put32(off, v)); a.entries[1].onCentral(put32(off+2, v)) }
	}
	end := func(f func([]byte) []byte) func(*archive) { return func(a *archive) { a.onEnd(f) } }
	name := func(s string) func(*archive) { return func(a *archive) { a.entries[1].name = s } }

	// Method 8 is read, so that it depends on what comes first.
	add("A1", "method local 8", "ErrCorrupt", local(put16(8, 8)))
	add("A1", "method central 8", "ErrMismatch", central(put16(10, 8)))
	add("A1", "method 8", "ErrCorrupt", both16(8, 8))
	for _, m := range []uint16{9, 12, 14, 93, 99, 0xffff} {
		add("A1", fmt.Sprint("method local ", m), "ErrCompressed", local(put16(8, m)))
		add("A1", fmt.Sprint("method central ", m), "ErrMismatch", central(put16(10, m)))
		add("A1", fmt.Sprint("method ", m), "ErrCompressed", both16(8, m))
	}

	for _, n := range []uint32{0, 2, 4, 0x7fffffff, 0x80000000, 0xfffffffe} {
		add("A2", fmt.Sprint("packed local ", n), "ErrFormat", local(put32(18, n)))
		add("A2", fmt.Sprint("size local ", n), "ErrFormat", local(put32(22, n)))
		add("A2", fmt.Sprint("packed central ", n), "ErrMismatch", central(put32(20, n)))
		add("A2", fmt.Sprint("size central ", n), "ErrMismatch", central(put32(24, n)))
		want := "ErrSize"
		if n == 0 {
			want = "ErrFormat"
		}
		add("A2", fmt.Sprint("sizes ", n), want, func(a *archive) { both32(18, n)(a); both32(22, n)(a) })
	}

	add("A3", "name local", "ErrExtraEntry", local(func(h []byte) { h[30] = 'x' }))
	add("A3", "name local of the other", "ErrSize", local(func(h []byte) { h[30] = 'b' }))
	add("A3", "name central", "ErrMismatch", central(func(h []byte) { h[46] = 'x' }))
	add("A3", "name central of the other", "ErrMismatch", central(func(h []byte) { h[46] = 'b' }))
	add("A3", "name central case", "ErrMismatch", central(func(h []byte) { h[46] = 'A' }))
	add("A3", "name length local 0", "ErrName", local(put16(26, 0)))
	add("A3", "name length local 1", "ErrExtraEntry", local(put16(26, 1)))
	add("A3", "name length local 65535", "ErrHeaderTooLong", local(put16(26, 0xffff)))
	add("A3", "name length central 4", "ErrMismatch", central(put16(28, 4)))
	add("A3", "name length central 65535", "ErrHeaderTooLong", central(put16(28, 0xffff)))
	add("A3", "Unicode path field", "ErrFormat", func(a *archive) { a.entries[1].extra = "up\x0a\x00\x01\x00\x00\x00\x00x.bin" })
	add("A3", "Unicode path field in the directory", "ErrMismatch", func(a *archive) {
		a.entries[1].dir = func(c []byte) []byte { put16(30, 14)(c); return append(c, "up\x0a\x00\x01\x00\x00\x00\x00x.bin"...) }
	})

	add("A4", "name with slash", "ErrName", name("a.bin/"))
	add("A4", "name with backslash", "ErrName", name("a.bin\\"))
	add("A4", "name with slash and no data", "ErrName", func(a *archive) { a.entries[1].name, a.entries[1].data = "a.bin/", "" })
	add("A4", "DOS directory", "ErrFormat", central(put32(38, 0x10)))
	add("A4", "Unix directory", "ErrFormat", central(func(h []byte) { h[5] = 3; put32(38, 0o040755<<16)(h) }))
	add("A4", "Unix directory and DOS file", "ErrFormat", central(func(h []byte) { h[5] = 3; put32(38, 0o040755<<16|0x20)(h) }))
	add("A4", "Unix file and DOS directory", "ErrFormat", central(func(h []byte) { h[5] = 3; put32(38, 0o100644<<16|0x10)(h) }))
	add("A4", "symbolic link", "ErrFormat", central(func(h []byte) { h[5] = 3; put32(38, 0o120777<<16)(h) }))
	add("A4", "device", "ErrFormat", central(func(h []byte) { h[5] = 3; put32(38, 0o060644<<16)(h) }))
	add("A4", "Unix file", "", central(func(h []byte) { h[5] = 3; put32(38, 0o100644<<16)(h) }))
	add("A4", "DOS file", "", central(put32(38, 0x20)))

	for _, bit := range []int{0, 6, 13} {
		add("A5", fmt.Sprint("flag local ", bit), "ErrEncrypted", local(put16(6, 1<<bit)))
		add("A5", fmt.Sprint("flag central ", bit), "ErrMismatch", central(put16(8, 1<<bit)))
		add("A5", fmt.Sprint("flag ", bit), "ErrEncrypted", both16(6, 1<<bit))
	}
	for _, bit := range []int{1, 2, 4, 5, 7, 10, 12, 14, 15} {
		add("A5", fmt.Sprint("flag ", bit), "ErrFormat", both16(6, 1<<bit))
	}
	add("A5", "flag 11", "", both16(6, 1<<11))
	add("A5", "AES", "ErrEncrypted", func(a *archive) {
		both16(6, 1)(a)
		both16(8, 99)(a)
		a.entries[1].extra = "\x01\x99\x07\x00\x02\x00AE\x03\x00\x00"
	})
	add("A5", "archive decryption header", "ErrFormat", func(a *archive) { a.entries[2].between = "PK\x06\x08\x00\x00\x00\x00" })

	add("B1", "duplicate", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, a.entries[1]) })
	add("B1", "duplicate, other content", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, entry{name: "a.bin", data: "XXX"}) })
	add("B1", "duplicate first, other content", "ErrDigest", func(a *archive) {
		a.entries = slices.Insert(a.entries, 1, entry{name: "a.bin", data: "XXX"})
	})
	add("B1", "duplicate manifest", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, a.entries[0]) })
	add("B1", "duplicate manifest second", "ErrDuplicate", func(a *archive) {
		a.entries = slices.Insert(a.entries, 1, entry{name: "manifest.json", data: "{}"})
	})
	add("B1", "duplicate, hidden from the directory", "ErrDuplicate", func(a *archive) {
		a.entries = append(a.entries, entry{name: "a.bin", data: "XXX", noDir: true})
	})
	add("B1", "duplicate in the directory", "ErrMismatch", func(a *archive) {
		a.entries[1].dir = func(c []byte) []byte { return append(c, c...) }
	})
	add("B1", "duplicate in another directory", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, entry{name: "x/a.bin", data: "XXX"}) })

	for _, s := range []string{"a.bin\x00", "a.bin\x00.txt", "\x00a.bin", "a\r\n.bin", "a\x1b[2J.bin", "a.bin\x7f", "a.bin ", " a.bin", "\xffa.bin", "\xc3\x28.bin", "a\u202enib.", "\ufeffa.bin", "a:b", "a?", "a*", "a|b", "<a>", "a\"b", "a;b", "$(a)", "`a`", "a\tb", "a%2fb", "\u0430.bin"} {
		add("B2", fmt.Sprintf("name %+q", s), "ErrName", name(s))
	}
	add("B2", "name \"\\u0430.bin\" marked UTF-8", "ErrName", func(a *archive) { name("\u0430.bin")(a); both16(6, 1<<11)(a) })

	for _, s := range []string{"./a.bin", "../a.bin", "x/../a.bin", "/a.bin", "//a.bin", "a.bin/.", "a.bin//", "..", ".", ".\\a.bin", "..\\a.bin", "c:a.bin", "c:\\a.bin", "\\\\h\\a.bin", "x/a.bin", "%2e%2e/a.bin"} {
		add("B3", fmt.Sprintf("name %q", s), "ErrName", name(s))
	}
	for _, s := range []string{"a.bin.", "...", ".a.bin", "a..bin"} {
		add("B3", fmt.Sprintf("name %q", s), "ErrExtraEntry", name(s))
	}

	for _, s := range []string{"A.BIN", "A.bin", "a.BIN", "a.biN"} {
		add("B4", fmt.Sprintf("name %q", s), "ErrExtraEntry", name(s))
	}
	add("B4", "name with dotless i", "ErrName", name("a.b\u0131n"))
	add("B4", "name with full-width a", "ErrName", name("\uff41.bin"))
	add("B4", "both cases", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, entry{name: "A.BIN", data: "XXX"}) })
	add("B4", "both cases, of the manifest", "ErrDuplicate", func(a *archive) { a.entries = append(a.entries, entry{name: "MANIFEST.JSON", data: "{}"}) })
	add("B4", "manifest in caps", "ErrNoManifest", func(a *archive) { a.entries[0].name = "MANIFEST.JSON" })

	add("C1", "entry hidden from the directory", "ErrMismatch", func(a *archive) { a.entries[1].noDir = true })
	add("C1", "last entry hidden from the directory", "ErrMismatch", func(a *archive) { a.entries[2].noDir = true })
	add("C1", "extra entry hidden from the directory", "ErrExtraEntry", func(a *archive) { a.entries = append(a.entries, entry{name: "x", data: "x", noDir: true}) })
	add("C1", "entry in the directory only", "ErrMismatch", func(a *archive) {
		a.entries[2].dir = func(c []byte) []byte {
			more := bytes.Clone(c)
			more[46] = 'c'
			return append(c, more...)
		}
	})
	add("C1", "gap", "ErrFormat", func(a *archive) { a.entries[1].between = "junk" })
	add("C1", "gap before the directory", "ErrFormat", func(a *archive) { a.entries[2].between = "\x00\x00\x00\x00" })
	add("C1", "directory in another order", "ErrMismatch", func(a *archive) { swap(&a.entries[1], &a.entries[2]) })
	add("C1", "streamed", "ErrStreamed", func(a *archive) {
		e := &a.entries[1]
		e.flags, e.descriptor = 8, descriptorOf(e.data, true)
		e.onLocal(func(h []byte) { clear(h[14:26]) })
	})
	add("C1", "descriptor", "", func(a *archive) { a.entries[1].flags, a.entries[1].descriptor = 8, descriptorOf("AAA", true) })
	add("C1", "descriptor without signature", "", func(a *archive) { a.entries[1].flags, a.entries[1].descriptor = 8, descriptorOf("AAA", false) })
	add("C1", "descriptor of other data", "ErrCRC", func(a *archive) { a.entries[1].flags, a.entries[1].descriptor = 8, descriptorOf("AAB", true) })
	add("C1", "descriptor with other sizes", "ErrCRC", func(a *archive) {
		d := []byte(descriptorOf("AAA", true))
		put32(8, 4)(d)
		a.entries[1].flags, a.entries[1].descriptor = 8, string(d)
	})
	add("C1", "descriptor of 64 bits", "ErrCRC", func(a *archive) {
		d := []byte(descriptorOf("AAA", true))
		a.entries[1].flags, a.entries[1].descriptor = 8, string(slices.Concat(d[:12], make([]byte, 4), d[12:], make([]byte, 4)))
	})
	add("C1", "descriptor not announced", "ErrFormat", func(a *archive) { a.entries[1].descriptor = descriptorOf("AAA", true) })
	add("C1", "descriptor announced only", "ErrCRC", func(a *archive) { a.entries[1].flags = 8 })
	add("C1", "offset of another entry", "ErrMismatch", func(a *archive) { a.entries[1].onCentral(put32(42, 0)) })

	empty := (&archive{}).bytes()
	add("C2", "end record in the comment", "ErrFormat", end(func(b []byte) []byte { put16(20, 22)(b); return append(b, empty...) }))
	add("C2", "two end records", "ErrTrailing", end(func(b []byte) []byte { return append(b, b...) }))
	add("C2", "empty end record after", "ErrTrailing", end(func(b []byte) []byte { return append(b, empty...) }))
	add("C2", "empty end record before", "ErrMismatch", end(func(b []byte) []byte { return append(bytes.Clone(empty), b...) }))
	add("C2", "empty archive before", "ErrNoManifest", func(a *archive) { a.before = string(empty) })
	add("C2", "archive after", "ErrTrailing", end(func(b []byte) []byte { return append(b, small().bytes()...) }))
	add("C2", "archive before", "ErrTrailing", func(a *archive) { a.before = string(small().bytes()) })
	add("C2", "junk before", "ErrNotZip", func(a *archive) { a.before = "#!/bin/sh\n" })
	add("C2", "split marker before", "ErrNotZip", func(a *archive) { a.before = "PK\x07\x08" })
	add("C2", "junk after", "ErrTrailing", end(func(b []byte) []byte { return append(b, 0) }))
	add("C2", "comment", "ErrFormat", end(func(b []byte) []byte { put16(20, 1)(b); return append(b, 'x') }))
	add("C2", "comment longer than the file", "ErrFormat", end(func(b []byte) []byte { put16(20, 100)(b); return b }))
	add("C2", "end record cut", "ErrTruncated", end(func(b []byte) []byte { return b[:21] }))
	add("C2", "no end record", "ErrTruncated", end(func([]byte) []byte { return nil }))
	add("C2", "volumes", "ErrFormat", end(func(b []byte) []byte { put16(4, 1)(b); return b }))
	add("C2", "volume of the directory", "ErrFormat", end(func(b []byte) []byte { put16(6, 1)(b); return b }))

	for _, n := range []uint16{0, 1, 2, 4, 0xfffe, 0xffff} {
		add("C3", fmt.Sprint("entries ", n), "ErrMismatch", end(func(b []byte) []byte { put16(8, n)(b); put16(10, n)(b); return b }))
		add("C3", fmt.Sprint("entries here ", n), "ErrMismatch", end(func(b []byte) []byte { put16(8, n)(b); return b }))
		add("C3", fmt.Sprint("entries in all ", n), "ErrMismatch", end(func(b []byte) []byte { put16(10, n)(b); return b }))
	}

	shift := func(off int, by uint32) func([]byte) []byte {
		return func(b []byte) []byte { put32(off, le.Uint32(b[off:])+by)(b); return b }
	}
	for _, by := range []uint32{1, 4, 46, 0x80000000, 0xffffffff, 0xfffffffc} {
		add("C4", fmt.Sprint("directory offset shifted by ", int32(by)), "ErrMismatch", end(shift(16, by)))
		add("C4", fmt.Sprint("directory size shifted by ", int32(by)), "ErrMismatch", end(shift(12, by)))
	}
	add("C4", "directory offset 0", "ErrMismatch", end(func(b []byte) []byte { put32(16, 0)(b); return b }))
	add("C4", "directory offset max", "ErrMismatch", end(func(b []byte) []byte { put32(16, 0xffffffff)(b); return b }))
	add("C4", "two directories", "ErrMismatch", func(a *archive) { // the end record means the second one
		a.entries[2].dir = func(c []byte) []byte { return append(c, c...) }
		a.onEnd(shift(16, 51))
		a.onEnd(shift(12, ^uint32(50)))
	})

	end64 := func(entries, size, off uint64) []byte {
		b := []byte("PK\x06\x06")
		b = le.AppendUint64(b, 44)
		b = append(b, 45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		b = le.AppendUint64(b, entries)
		b = le.AppendUint64(b, entries)
		b = le.AppendUint64(b, size)
		return le.AppendUint64(b, off)
	}
	locator := func(off uint64) []byte {
		return append(le.AppendUint64([]byte("PK\x06\x07\x00\x00\x00\x00"), off), 1, 0, 0, 0)
	}
	add("C5", "zip64 end record", "ErrZip64", end(func(b []byte) []byte {
		size, off := le.Uint32(b[12:]), le.Uint32(b[16:])
		return slices.Concat(end64(3, uint64(size), uint64(off)), locator(uint64(size+off)), b)
	}))
	add("C5", "zip64 end record that contradicts", "ErrZip64", end(func(b []byte) []byte {
		size, off := le.Uint32(b[12:]), le.Uint32(b[16:])
		put16(8, 0xffff)(b)
		put16(10, 0xffff)(b)
		put32(12, 0xffffffff)(b)
		put32(16, 0xffffffff)(b)
		return slices.Concat(end64(1, 46, 0), locator(uint64(size+off)), b)
	}))
	add("C5", "zip64 locator alone", "ErrFormat", end(func(b []byte) []byte { return slices.Concat(locator(0), b) }))
	add("C5", "zip64 sizes", "ErrZip64", func(a *archive) { both32(18, 0xffffffff)(a); both32(22, 0xffffffff)(a) })
	add("C5", "zip64 size local", "ErrZip64", local(put32(22, 0xffffffff)))
	add("C5", "zip64 packed local", "ErrZip64", local(put32(18, 0xffffffff)))
	add("C5", "zip64 size central", "ErrMismatch", central(put32(24, 0xffffffff)))
	add("C5", "zip64 field", "ErrFormat", func(a *archive) {
		a.entries[1].extra = "\x01\x00\x10\x00" + string(le.AppendUint64(le.AppendUint64(nil, 3), 3))
	})
	add("C5", "two zip64 fields", "ErrFormat", func(a *archive) {
		a.entries[1].extra = strings.Repeat("\x01\x00\x08\x00"+string(le.AppendUint64(nil, 3)), 2)
	})
	add("C5", "zip64 offset central", "ErrMismatch", central(put32(42, 0xffffffff)))
	for _, v := range []uint16{45, 46, 63, 0xffff} {
		add("C5", fmt.Sprint("version ", v), "ErrZip64", both16(4, v))
	}
	add("C5", "version 21", "ErrFormat", both16(4, 21))
	add("C5", "version 10", "", both16(4, 10))
	return vs
}

func descriptorOf(data string, signed bool) string {
	h := (&archive{entries: []entry{{data: data}}}).bytes()[14:26]
	if signed {
		return "PK\x07\x08" + string(h)
	}
	return string(h)
}

// oddNames are names that some system takes for something else than a plain file
// of this directory.
func oddNames() []string {
	names := []string{
		"", ".", "..", "...", "/", "//", "///", "\\", "./", "../", "..\\", "/..", "/.", "~", "~root", "~/a", "-", "--help", "-rf",
		"../etc/passwd", "../../etc/passwd", "../../../../../../../../etc/passwd", "/etc/passwd", "//etc/passwd", "/./etc/passwd",
		"./../etc/passwd", "x/../../etc/passwd", "x/./../../etc/passwd", "x//../../etc/passwd", "....//etc/passwd", "..//etc/passwd", "..;/etc/passwd",
		"..\\..\\windows\\win.ini", "\\windows\\win.ini", "c:\\windows\\win.ini", "c:/windows/win.ini", "c:win.ini", "C:", "c:\\..\\x",
		"\\\\server\\share\\x", "//server/share/x", "\\\\?\\c:\\x", "\\\\.\\PhysicalDrive0", "\\??\\c:\\x", "x\\..\\..\\y", "x/..\\..\\y", "..\\/..\\/y",
		"%2e%2e/etc/passwd", "%2e%2e%2fetc%2fpasswd", "..%2fetc%2fpasswd", "..%5cx", "%252e%252e%252fx", "..%c0%afx", "..%c1%9cx", "%00", "a%00.bin",
		"..\xc0\xafetc", "..\xc1\x9cx", "\xc0\xae\xc0\xae/x", "\xe0\x80\xae./x", "\uff0e\uff0e/x", "\uff0e\uff0e\uff0fx", "\u2025/x", "..\u2215x", "..\u2044x", "..\u29f5x", "..\uff3cx", "\u2024\u2024/x",
		"con", "CON", "con.txt", "nul", "NUL.bin", "aux", "prn", "com1", "lpt1.bin", "COM\u00b9", "conin$", "clock$",
		"a.bin::$DATA", "a.bin:stream", "a.bin:stream:$DATA", ":x", "a.", "a..", "a ", "a. ", " a", "a\t", "\ta", "a\n", "\na", "a\r", "a\r\nX: y", "a\x00", "\x00", "a\x00/../b", "a\x01", "\x1b[2Ja", "\x1b]0;x\a", "\x7f", "\x80", "\xff", "\xfe\xff\x00a", "\xed\xa0\x80",
		"a\u200b", "\u200ea", "a\u202ecod.exe", "\ufeffa", "a\u0301", "\u00e1", "\u212a", "\u017f", "\u0131", "\ud7ff", "\U0001f4a9", "\ufffd", "\u00a0", "\u3000",
		"*", "?", "a*", "[a]", "{a,b}", "a|b", "a;b", "a&b", "a`id`", "$(id)", "$HOME", "${IFS}", "'a'", "\"a\"", "<a>", "a>b", "#a", "!a", "a=b", "a,b", "a@b", "(a)", "a^b", "\\a", "a\\nb", "%s%s%n", "%x", "{{a}}", "<script>", "' OR 1=1", "a b",
		"dev/null", "/dev/null", "/dev/mtd0", "/proc/self/mem", "proc/self/fd/3", "/sys/firmware", "dev/fd/3", "a/b", "a/b/c", "a/", "a//b", "a/./b", "a/../b", "/a", "a/b/", ".git/config", "x/manifest.json", "manifest.json/", "manifest.json/x", "./manifest.json", "../manifest.json", "MANIFEST.JSON", "manifest.json ", "manifest.json.", "manifest.json\x00", "manifest.jso", "manifest.jsonx", "__MACOSX/a", "__MACOSX/._a.bin", ".DS_Store", "._a.bin", "Thumbs.db", "META-INF/MANIFEST.MF", "mimetype", "[Content_Types].xml",
	}
	for _, n := range []int{49, 50, 64, 128, 129, 255, 256, 1024, 4096, 65000} {
		names = append(names, strings.Repeat("x", n))
	}
	return append(names, strings.Repeat("../", 30)+"x", strings.Repeat("../", 700)+"x", strings.Repeat("a/", 30)+"x", strings.Repeat("/", 60), strings.Repeat("a/", 1500)+"x", strings.Repeat("\u00e9", 30), strings.Repeat("..\\", 20))
}

// nameError is what an entry of this name gives that the manifest does not name.
func nameError(s string) string {
	ok := len(s) >= 1 && len(s) <= 49 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._+-", r))
	})
	switch {
	case len(s) > 2048-30:
		return "ErrHeaderTooLong"
	case strings.HasPrefix(s, "__MACOSX/"):
		return "ErrExtraEntry"
	case strings.EqualFold(strings.TrimPrefix(s, "x/"), "manifest.json"):
		return "ErrDuplicate"
	case ok:
		return "ErrExtraEntry"
	}
	return "ErrName"
}

// archives returns the hostile archives, and some that only look so.
func archives() (all []sample) {
	add := func(class, name string, b []byte, want ...string) {
		all = append(all, sample{Name: class + ": " + name, Class: class, raw: b, want: want})
	}
	vs := variants()
	for _, v := range vs {
		a := small()
		v.do(a)
		add(v.class, v.name, a.bytes(), v.want)
	}

	// Two classes at a time: whatever is found first must be one of the two, or
	// what both make together.
	both := map[string]string{
		`name local of the other, name " a.bin"`:        "ErrExtraEntry", // "ba.bin"
		`name with slash and no data, name "\xffa.bin"`: "ErrFormat",     // no data
	}
	var classes []string
	byClass := map[string][]variant{}
	for _, v := range vs {
		if byClass[v.class] == nil {
			classes = append(classes, v.class)
		}
		byClass[v.class] = append(byClass[v.class], v)
	}
	for i, c := range classes {
		for k, d := range classes[:i] {
			for n := range 3 {
				v, w := byClass[c][(5*n+k)%len(byClass[c])], byClass[d][(7*n+i)%len(byClass[d])]
				a := small()
				w.do(a)
				v.do(a)
				name := fmt.Sprintf("%s, %s", w.name, v.name)
				want := []string{v.want, w.want, both[name]}
				if v.want != "" || w.want != "" || both[name] != "" {
					want = slices.DeleteFunc(want, func(s string) bool { return s == "" })
				}
				add(d+"+"+c, name, a.bytes(), want...)
			}
		}
	}

	for i, s := range oddNames() {
		a := &archive{entries: []entry{
			{name: "manifest.json", data: manifestOf("a.bin", "AAA")}, {name: s, data: "AAA"},
		}}
		add("name", fmt.Sprintf("%d %.40q", i, s), a.bytes(), nameError(s))
		// The manifest wants it so.
		if want := nameError(s); len(s) < 2000 {
			a.entries[0].data = manifestOf(s, "AAA")
			switch {
			case strings.Contains(s, "/"):
				want = "ErrName"
			case want == "ErrDuplicate":
				want = "ErrManifest"
			case want == "ErrExtraEntry":
				want = ""
			case s == "" || strings.ToValidUTF8(s, "") != s:
				want = "ErrManifest" // has no such string, or has it replaced
			}
			if strings.ToValidUTF8(s, "") != s {
				want = "ErrName" // U+FFFD
			}
			add("name in manifest", fmt.Sprintf("%d %.40q", i, s), a.bytes(), want)
		}
	}

	fields(add)
	advisories(add)
	bombs(add)
	harmless(add)
	return all
}

type adder func(class, name string, b []byte, want ...string)

// fields changes every field of every record to the ends of its range.
func fields(add adder) {
	broken := []string{"ErrTruncated", "ErrFormat", "ErrMismatch", "ErrHeaderTooLong", "ErrCompressed", "ErrStreamed", "ErrZip64",
		"ErrEncrypted", "ErrName", "ErrExtraEntry", "ErrMissing", "ErrSize", "ErrCRC", "ErrCorrupt"}
	type field struct {
		name     string
		off, len int
		free     bool // devices do not look at it
	}
	locals := []field{{"signature", 0, 4, false}, {"version", 4, 2, false}, {"flags", 6, 2, false}, {"method", 8, 2, false}, {"time", 10, 2, false}, {"date", 12, 2, false}, {"crc", 14, 4, false}, {"packed", 18, 4, false}, {"size", 22, 4, false}, {"name length", 26, 2, false}, {"extra length", 28, 2, false}}
	centrals := []field{{"signature", 0, 4, false}, {"made by", 4, 2, true}, {"version", 6, 2, false}, {"flags", 8, 2, false}, {"method", 10, 2, false}, {"time", 12, 2, false}, {"date", 14, 2, false}, {"crc", 16, 4, false}, {"packed", 20, 4, false}, {"size", 24, 4, false}, {"name length", 28, 2, false}, {"extra length", 30, 2, false}, {"comment length", 32, 2, false}, {"volume", 34, 2, false}, {"internal attributes", 36, 2, true}, {"external attributes", 38, 4, true}, {"offset", 42, 4, false}}
	ends := []field{{"signature", 0, 4, false}, {"volume", 4, 2, false}, {"directory's volume", 6, 2, false}, {"entries here", 8, 2, false}, {"entries", 10, 2, false}, {"directory size", 12, 4, false}, {"directory offset", 16, 4, false}, {"comment length", 20, 2, false}}
	base := small().bytes()
	try := func(record string, f field, do func(a *archive, set func([]byte)), more ...string) {
		top := uint32(1)<<(8*f.len-1) - 1
		for _, v := range []uint32{0, 1, top, top + 1, 2 * top, 2*top + 1} {
			a := small()
			do(a, func(h []byte) {
				if f.len == 2 {
					put16(f.off, uint16(v))(h)
				} else {
					put32(f.off, v)(h)
				}
			})
			b := a.bytes()
			want := append(slices.Clone(broken), more...)
			if bytes.Equal(b, base) || f.free {
				want = []string{""}
				if f.name == "external attributes" && v&0x10 != 0 {
					want = []string{"ErrFormat"}
				}
			}
			if slices.Contains(more, "") {
				want = append(want, "")
			}
			add("field", fmt.Sprintf("%s %s = %#x", record, f.name, v), b, want...)
		}
	}
	for _, f := range locals {
		try("local", f, func(a *archive, set func([]byte)) { a.entries[1].onLocal(set) })
		if f.len == 2 && (f.name == "time" || f.name == "date" || f.name == "version") {
			try("local and central", f, func(a *archive, set func([]byte)) {
				a.entries[1].onLocal(set)
				a.entries[1].onCentral(func(h []byte) { set(h[2:]) })
			}, "")
		}
	}
	for _, f := range centrals {
		try("central", f, func(a *archive, set func([]byte)) { a.entries[1].onCentral(set) })
	}
	for _, f := range ends {
		try("end", f, func(a *archive, set func([]byte)) { a.onEnd(func(b []byte) []byte { set(b); return b }) })
	}
}

// advisories rebuilds what the advisories about archive/zip describe
// (pkg.go.dev/vuln).
func advisories(add adder) {
	withName := func(s string) []byte {
		a := small()
		a.entries = append(a.entries, entry{name: s, data: "x"})
		return a.bytes()
	}
	add("GO-2021-0067", "file name that begins with ../", withName("../test.txt"), "ErrName")
	add("GO-2021-0067", "first name that begins with ../", (&archive{entries: []entry{{name: "../test.txt", data: "x"}}}).bytes(), "ErrName")
	for _, s := range []string{"", "/", "//", "..", "../", "../..", "/..", "\\"} {
		add("GO-2021-0264", fmt.Sprintf("file name %q", s), withName(s), "ErrName")
	}
	counted := func(entries, size uint64, at string) []byte {
		a := &archive{}
		if at == "entries" {
			a = small()
		}
		a.onEnd(func(b []byte) []byte {
			n := uint64(le.Uint32(b[12:]) + le.Uint32(b[16:]))
			put16(8, 0xffff)(b)
			put16(10, 0xffff)(b)
			put32(12, 0xffffffff)(b)
			put32(16, 0xffffffff)(b)
			r := append(le.AppendUint64([]byte("PK\x06\x06"), 44), 45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0)
			for _, v := range []uint64{entries, entries, size, 0} {
				r = le.AppendUint64(r, v)
			}
			l := append(le.AppendUint64([]byte("PK\x06\x07\x00\x00\x00\x00"), n), 1, 0, 0, 0)
			return slices.Concat(r, l, b)
		})
		return a.bytes()
	}
	for _, n := range []uint64{65535, 1 << 24, 1 << 31, 1 << 32, 1<<60 + 1, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		add("GO-2021-0240", fmt.Sprint(n, " files in no archive"), counted(n, 0, ""), "ErrNotZip")
		add("GO-2021-0240", fmt.Sprint(n, " files"), counted(n, 0, "entries"), "ErrZip64")
		// The first fix divided the file's size, then the directory's, which is a claim, too.
		add("GO-2022-0273", fmt.Sprint(n, " files in a directory of as many bytes"), counted(n, n, "entries"), "ErrZip64")
	}
	add("GO-2021-0240", "65535 files, 16 bits", with(func(a *archive) {
		a.onEnd(func(b []byte) []byte { put16(8, 0xffff)(b); put16(10, 0xffff)(b); return b })
	}).bytes(), "ErrMismatch")
	// The last end record has a comment that is longer than the file: others go
	// on looking, and find an earlier record.
	a, b := small(), small()
	a.onEnd(func(e []byte) []byte { put16(20, 30)(e); return e })
	add("GO-2024-2888", "comment cut", a.bytes(), "ErrFormat")
	a = small()
	a.onEnd(func(e []byte) []byte {
		put16(20, 22)(e)
		last := bytes.Clone(e)
		put16(20, 5)(last)
		return append(e, last...)
	})
	add("GO-2024-2888", "comment with an end record whose comment is cut", a.bytes(), "ErrFormat")
	b.onEnd(func(e []byte) []byte {
		last := bytes.Clone(e)
		put16(20, 0xffff)(last)
		return append(e, last...)
	})
	add("GO-2024-2888", "second end record whose comment is cut", b.bytes(), "ErrTrailing")
	for _, n := range []int{100, 1000, 32000} {
		add("GO-2026-4342", fmt.Sprint("name of ", n, " directories"), withName(strings.Repeat("a/", n)+"x"), nameError(strings.Repeat("a/", n)))
		add("GO-2026-4342", fmt.Sprint("first name of ", n, " directories"),
			(&archive{entries: []entry{{name: strings.Repeat("a/", n) + "manifest.json", data: "{}"}}}).bytes(), nameError(strings.Repeat("a/", n)))
	}
	many := small()
	for i := range 60 {
		many.entries = append(many.entries, entry{name: strings.Repeat("a/", i+100) + fmt.Sprint(i), data: "x"})
	}
	add("GO-2026-4342", "many names of many directories", many.bytes(), "ErrName")
}

// bombs are small for what they expand to, or pretend to.
func bombs(add adder) {
	zeros := bomb(4000) // about 1 MB of zero bytes in 1 kB
	n := uint32(4000*258 + 1)
	packed := small()
	packed.entries[1] = entry{name: "a.bin", data: zeros}
	packed.entries[1].onLocal(put16(8, 8))
	packed.entries[1].onLocal(put32(22, n))
	packed.entries[1].onCentral(put16(10, 8))
	packed.entries[1].onCentral(put32(24, n))
	add("bomb", "deflate 1032:1", packed.bytes(), "ErrSize")
	packed.entries[0], packed.entries[1] = entry{name: "manifest.json", data: zeros, local: packed.entries[1].local, central: packed.entries[1].central}, packed.entries[0]
	add("bomb", "deflated manifest 1032:1", packed.bytes(), "ErrTooLarge")
	for k, name := range []string{"manifest.json", "a.bin"} { // the size is small, what comes is not
		a := small()
		claim := uint32(len(a.entries[k].data))
		a.entries[k] = entry{name: name, data: zeros}
		a.entries[k].onLocal(put16(8, 8))
		a.entries[k].onLocal(put32(22, claim))
		a.entries[k].onCentral(put16(10, 8))
		a.entries[k].onCentral(put32(24, claim))
		add("bomb", "deflate 1032:1 that claims to be small, "+name, a.bytes(), "ErrCorrupt")
	}
	for _, e := range []int{0, 1} {
		for _, v := range []uint32{1 << 20, 1 << 31, 0xfffffffe} {
			a := small()
			a.entries[e].onLocal(put32(18, v))
			a.entries[e].onLocal(put32(22, v))
			want := "ErrSize"
			if e == 0 {
				want = "ErrTooLarge"
			}
			add("bomb", fmt.Sprintf("entry %d claims %d bytes", e, v), a.bytes(), want)
		}
	}
	a := &archive{entries: []entry{{name: "manifest.json", data: fmt.Sprintf(`{"parts":{"a":{"src":"a.bin","size":%d,"cs_sha256":%q}}}`, uint32(0xfffffffe), sum256(""))}, {name: "a.bin", data: "AAA"}}}
	a.entries[1].onLocal(put32(18, 0xfffffffe))
	a.entries[1].onLocal(put32(22, 0xfffffffe))
	add("bomb", "entry and manifest claim 4 GiB", a.bytes(), "ErrTruncated")

	// All entries of the directory mean the same bytes.
	full := small()
	full.entries[1].dir = func(c []byte) []byte {
		var all []byte
		for i := range 200 {
			d := bytes.Clone(c)
			copy(d[46:], fmt.Sprintf("%05d", i))
			all = append(all, d...)
		}
		return all
	}
	full.onEnd(func(b []byte) []byte { put16(8, 202)(b); put16(10, 202)(b); return b })
	add("bomb", "200 entries over the same bytes", full.bytes(), "ErrMismatch")
	// Each entry's data holds all entries after it.
	inner := ""
	for i := range 12 {
		if i == 0 {
			inner = "kernel"
		}
		e := (&archive{entries: []entry{{name: fmt.Sprintf("f%02d", i), data: inner}}}).bytes()
		inner = string(e[:33+len(inner)])
	}
	quote := small()
	quote.entries[1].data = inner
	add("bomb", "12 entries, each in the one before", quote.bytes(), "ErrSize")
	quote.entries[0].data = manifestOf("a.bin", inner, "b.bin", "BB")
	quote.entries[1].dir = func(c []byte) []byte {
		d := bytes.Clone(c)
		put32(42, le.Uint32(c[42:])+35)(d)
		return append(c, d...)
	}
	quote.onEnd(func(b []byte) []byte { put16(8, 4)(b); put16(10, 4)(b); return b })
	add("bomb", "entry inside of another, in the directory", quote.bytes(), "ErrMismatch")

	// Archives that hold themselves: the entry reaches over directory and end.
	self := &archive{entries: []entry{{name: "manifest.json", data: manifestOf("a.bin", "AAA")}, {name: "a.bin", data: "AAA"}}}
	whole := len(self.bytes()) - 30 - 13 - len(self.entries[0].data) - 35
	for _, crc := range []uint32{0, 1} {
		b := bytes.Clone(self.bytes())
		at := 30 + 13 + len(self.entries[0].data)
		put32(at+14, crc)(b)
		put32(at+18, uint32(whole))(b)
		put32(at+22, uint32(whole))(b)
		add("bomb", fmt.Sprint("entry that holds directory and end, CRC ", crc), b, "ErrSize")
	}
	nested := small().bytes()
	for i := range 8 {
		next := &archive{entries: []entry{{name: "manifest.json", data: manifestOf("a.bin", string(nested))}, {name: "a.bin", data: string(nested)}}}
		nested = next.bytes()
		if i == 0 || i == 7 {
			add("bomb", fmt.Sprint("archive in an archive, levels ", i+1), nested, "")
		}
	}
	cut := &archive{entries: []entry{{name: "manifest.json", data: manifestOf("a.bin", string(nested))}, {name: "a.bin", data: string(nested[:len(nested)-1])}}}
	add("bomb", "archive in an archive, cut", cut.bytes(), "ErrSize")

	many := small()
	for range 500 {
		many.entries = append(many.entries, entry{name: "a.bin"})
	}
	add("bomb", "500 empty entries", many.bytes(), "ErrFormat")
	for _, x := range []struct{ off int }{{26}, {28}} {
		a := small()
		a.entries[1].onLocal(put16(x.off, 0xffff))
		add("bomb", fmt.Sprint("header of 65535 more bytes, field ", x.off), a.bytes(), "ErrHeaderTooLong")
	}
	doc := func(name, text string, want string) {
		add("bomb", "manifest "+name, (&archive{entries: []entry{{name: "manifest.json", data: text}}}).bytes(), want)
	}
	doc("of 65537 bytes", "{"+strings.Repeat(" ", 65535)+"}", "ErrTooLarge")
	doc("nested 60000 deep", strings.Repeat("[", 60000), "ErrManifest")
	doc("with an unclosed string", `{"`+strings.Repeat("x", 60000), "ErrManifest")
	doc("with 5000 members", `{`+strings.Repeat(`"a":0,`, 5000)+`"b":0}`, "ErrManifest")
	doc("of 65 parts", `{"parts":{`+numbered(65, `"p%d":{"fill":0,"size":1}`)+`}}`, "ErrManifest")
	doc("that fills 4 GiB", `{"parts":{"a":{"fill":0,"size":4294967294}}}`, "ErrTooLarge")
	doc("that fills 16 MiB and a byte", `{"parts":{"a":{"fill":0,"size":16777216},"b":{"fill":0,"size":1}}}`, "ErrTooLarge")
	doc("with a size of 2^53", `{"parts":{"a":{"src":"a","size":9007199254740992}}}`, "ErrManifest")
	doc("with a size of 2^64+3", `{"parts":{"a":{"src":"a","size":18446744073709551619}}}`, "ErrManifest")
}

func numbered(n int, format string) string {
	s := make([]string, n)
	for i := range s {
		s[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(s, ",")
}

// bomb returns a deflate stream (RFC 1951) of 258*n+1 zero bytes, in which 258 of
// them take two bits.
func bomb(n int) string {
	var out []byte
	var acc, bits uint
	put := func(v uint, width int) { // least significant bit first
		acc |= v << bits
		for bits += uint(width); bits >= 8; bits -= 8 {
			out = append(out, byte(acc))
			acc >>= 8
		}
	}
	put(1, 1) // last block
	put(2, 2) // dynamic codes
	put(286-257, 5)
	put(0, 5)    // one distance code
	put(18-4, 4) // lengths of 18 code length codes follow
	for _, v := range []uint{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2} {
		put(v, 3) // code lengths of 16, 17, 18, 0, …: 18 has 1 bit, 2 and 1 have 2
	}
	// Codes: 18 is 0, 1 is 10, 2 is 11 (most significant bit first).
	zeros := func(n uint) { put(0, 1); put(n-11, 7) }
	one, two := func() { put(1, 2) }, func() { put(3, 2) }
	two() // literal 0
	zeros(138)
	zeros(255 - 138)
	two() // 256, the end
	zeros(28)
	one() // 285, length 258
	one() // distance 1
	// Codes: 285 is 0, literal 0 is 10, the end is 11; distance 1 is 0.
	put(1, 2)
	for range n {
		put(0, 2)
	}
	put(3, 2)
	put(0, 7)
	return string(out)
}

// harmless are archives that look strange and have one meaning all the same.
func harmless(add adder) {
	ok := func(name string, a *archive) { add("accepted", name, a.bytes(), "") }
	ok("plain", small())
	for _, dir := range []string{"x/", "fw-1.0+x/", "a.b_c/", ".x/", "-/", strings.Repeat("d", 128) + "/"} {
		a := small()
		for i := range a.entries {
			a.entries[i].name = dir + a.entries[i].name
		}
		ok(fmt.Sprintf("in directory %.20s", dir), a)
	}
	a := small()
	a.entries[1], a.entries[2] = a.entries[2], a.entries[1]
	ok("other order", a)
	for mask := range 8 {
		for _, signed := range []bool{false, true} {
			if mask == 0 {
				continue
			}
			a := small()
			for i := range a.entries {
				if mask>>i&1 != 0 {
					a.entries[i].flags, a.entries[i].descriptor = 8, descriptorOf(a.entries[i].data, signed)
				}
			}
			ok(fmt.Sprintf("descriptors %03b, signature %v", mask, signed), a)
		}
	}
	a = small()
	a.entries[1].flags, a.entries[1].descriptor = 8, descriptorOf("AAA", true)
	a.entries[1].onLocal(put32(14, 0))
	ok("CRC in the descriptor only", a)
	inside := string(small().bytes())
	for name, data := range map[string]string{
		"end record":                             string((&archive{}).bytes()),
		"end record signature":                   "PK\x05\x06",
		"local header":                           inside[:30],
		"archive":                                inside,
		"directory and end":                      inside[strings.Index(inside, "PK\x01\x02"):],
		"descriptor":                             descriptorOf("AAA", true),
		"descriptor of itself without signature": descriptorOf("AAA", false),
		"zip64 locator":                          "PK\x06\x07" + strings.Repeat("\x00", 16),
		"NUL":                                    "\x00",
		"end of the name":                        "PK",
		"64 zero bytes":                          strings.Repeat("\x00", 64),
		"4096 bytes":                             strings.Repeat("0123456789abcdef", 256),
	} {
		for _, last := range []bool{false, true} {
			for _, flags := range []uint16{0, 8} {
				files := []string{"a.bin", data, "b.bin", "BB"}
				if last {
					files = []string{"a.bin", "AAA", "b.bin", data}
				}
				a := &archive{entries: []entry{{name: "manifest.json", data: manifestOf(files...)}, {name: files[0], data: files[1]}, {name: files[2], data: files[3]}}}
				if flags != 0 {
					for i := range a.entries {
						a.entries[i].flags, a.entries[i].descriptor = flags, descriptorOf(a.entries[i].data, last)
					}
				}
				ok(fmt.Sprintf("data is %s, last %v, flags %d", name, last, flags), a)
			}
		}
	}
	for n := 1; n <= 64; n *= 4 {
		var files []string
		for i := range n {
			files = append(files, fmt.Sprint("f", i), fmt.Sprint(i))
		}
		a := &archive{entries: []entry{{name: "manifest.json", data: `{"parts":{` + numbered(n, `"p%d":{"src":"f%[1]d","size":%[2]d}`) + `}}`}}}
		var parts []string
		for i := 0; i < len(files); i += 2 {
			parts = append(parts, fmt.Sprintf(`"p%d":{"src":%q,"size":%d,"cs_sha256":%q}`, i/2, files[i], len(files[i+1]), sum256(files[i+1])))
			a.entries = append(a.entries, entry{name: files[i], data: files[i+1]})
		}
		a.entries[0].data = `{"parts":{` + strings.Join(parts, ",") + `}}`
		ok(fmt.Sprint("parts: ", n), a)
	}
	for _, x := range []string{"{}", `{"note":"x"}`, `{"a":{"b":[1]}}`, " {} ", "{\n}"} {
		a := small()
		a.entries[0].extra = "\x3a\x29" + string(le.AppendUint16(nil, uint16(len(x)))) + x
		ok("attributes "+strconv.Quote(x), a)
	}
	a = small()
	a.entries[0].data = strings.Replace(a.entries[0].data, `{"parts":{`, `{"parts":{"f":{"fill":255,"size":5},`, 1)
	ok("fill", a)
	a = small()
	a.entries[0].data = strings.Replace(a.entries[0].data, `"size":2`, `"size":2,"update":false`, 1)
	ok("part that is not installed", a)
	a = small()
	a.entries[0].data = "\n\t " + a.entries[0].data + " \r\n"
	ok("manifest with blanks", a)
}

// The bomb is one.
func TestBomb(t *testing.T) {
	z := bomb(4000)
	b, err := io.ReadAll(flate.NewReader(strings.NewReader(z)))
	require.NoError(t, err)
	require.Equal(t, make([]byte, 258*4000+1), b)
	require.Greater(t, len(b)/len(z), 950)
}
