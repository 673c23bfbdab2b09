package bundle_test

import (
	"bytes"
	"crypto/ecdsa"
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

func TestTruncated(t *testing.T) {
	file := load(t, "small.zip")
	for i := range file {
		_, _, err := content(t.Context(), lax, bytes.NewReader(file[:i]))
		require.ErrorIs(t, err, bundle.ErrTruncated, "%d bytes", i)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%d bytes", i)
	}
}

// Every byte of every record counts, but for what only the directory has and
// devices ignore: who made the archive, and the attributes.
func TestChangedBytes(t *testing.T) {
	for _, name := range []string{"small.zip", "signed.zip"} {
		file := load(t, name)
		want, _, err := content(t.Context(), lax, bytes.NewReader(file))
		require.NoError(t, err)
		free := map[int]bool{}
		for i := 0; ; i++ {
			k := bytes.Index(file[i:], []byte("PK\x01\x02"))
			if k < 0 {
				break
			}
			i += k
			for _, f := range []int{4, 5, 36, 37, 38, 39, 40, 41} {
				free[i+f] = true
			}
		}
		require.NotEmpty(t, free)
		strict := &bundle.Policy{Keys: []*ecdsa.PublicKey{key(t, "k0.pub.pem"), nil, key(t, "k2.pub.pem")}, AllowTestKeys: true}
		for i, old := range file {
			for _, b := range []byte{old ^ 1, old ^ 0x80, old ^ 0xff, 0} {
				if b == old {
					continue
				}
				file[i] = b
				p := lax
				if name == "signed.zip" {
					p = strict
				}
				got, _, err := content(t.Context(), p, bytes.NewReader(file))
				if err == nil {
					require.True(t, free[i], "%s: byte %d changed from %#x to %#x", name, i, old, b)
					require.Equal(t, want, got)
				}
			}
			file[i] = old
		}
	}
}

func put16(off int, v uint16) func([]byte) { return func(h []byte) { le.PutUint16(h[off:], v) } }
func put32(off int, v uint32) func([]byte) { return func(h []byte) { le.PutUint32(h[off:], v) } }

// both applies a change of a local header to the directory, too.
func both(e *entry, off int, f func(int) func([]byte)) {
	e.local, e.central = f(off), f(off+2)
}

func rename(s string) func(a *archive) { return func(a *archive) { a.entries[1].name = s } }

func TestHostileArchives(t *testing.T) {
	descriptor := func(data string, sig bool) string {
		a := archive{entries: []entry{{data: data}}}
		h := string(a.bytes()[14:26])
		if sig {
			return "PK\x07\x08" + h
		}
		return h
	}
	both16 := func(i, off int, v uint16) func(*archive) {
		return func(a *archive) { both(&a.entries[i], off, func(o int) func([]byte) { return put16(o, v) }) }
	}
	local32 := func(i, off int, v uint32) func(*archive) {
		return func(a *archive) { a.entries[i].local = put32(off, v) }
	}
	central32 := func(i, off int, v uint32) func(*archive) {
		return func(a *archive) { a.entries[i].central = put32(off, v) }
	}
	central16 := func(i, off int, v uint16) func(*archive) {
		return func(a *archive) { a.entries[i].central = put16(off, v) }
	}
	end := func(f func([]byte)) func(*archive) {
		return func(a *archive) { a.end = func(b []byte) []byte { f(b); return b } }
	}
	for name, c := range map[string]struct {
		change func(a *archive)
		err    error // nil: accepted
		text   string
	}{
		"unchanged": {func(*archive) {}, nil, ""},
		"directory": {func(a *archive) {
			for i := range a.entries {
				a.entries[i].name = "app-1.0/" + a.entries[i].name
			}
		}, nil, ""},
		"files in another order": {func(a *archive) { a.entries[1], a.entries[2] = a.entries[2], a.entries[1] }, nil, ""},
		"times":                  {both16(1, 10, 0x1234), nil, ""},
		"version 1.0":            {both16(1, 4, 10), nil, ""},
		"UTF-8 flag":             {both16(1, 6, 1<<11), nil, ""},
		"made on Unix":           {central32(1, 38, 0100644<<16), nil, ""},
		"descriptor with signature": {func(a *archive) {
			for i := range a.entries {
				a.entries[i].flags, a.entries[i].descriptor = 8, descriptor(a.entries[i].data, true)
			}
		}, nil, ""},
		"descriptor without signature": {func(a *archive) {
			for i := range a.entries {
				a.entries[i].flags, a.entries[i].descriptor = 8, descriptor(a.entries[i].data, false)
			}
		}, nil, ""},
		"descriptor, CRC only there": {func(a *archive) {
			a.entries[1].flags, a.entries[1].descriptor = 8, descriptor(appData, true)
			a.entries[1].local = put32(14, 0)
		}, nil, ""},

		"descriptor, CRC nowhere": {func(a *archive) {
			a.entries[1].flags, a.entries[1].descriptor = 8, "PK\x07\x08\x00\x00\x00\x00"+descriptor(appData, false)[4:]
			both(&a.entries[1], 14, func(o int) func([]byte) { return put32(o, 0) })
		}, bundle.ErrCRC, ""},
		"descriptor, CRC not in the directory": {func(a *archive) {
			a.entries[1].flags, a.entries[1].descriptor = 8, descriptor(appData, true)
			both(&a.entries[1], 14, func(o int) func([]byte) { return put32(o, 0) })
		}, bundle.ErrMismatch, ""},
		"descriptor of other data": {func(a *archive) {
			a.entries[1].flags, a.entries[1].descriptor = 8, descriptor(fsData, true)
		}, bundle.ErrCRC, "descriptor"},
		"descriptor missing": {func(a *archive) { a.entries[1].flags = 8 }, bundle.ErrCRC, "descriptor"},
		"descriptor without flag": {func(a *archive) {
			a.entries[1].descriptor = descriptor(appData, true)
		}, bundle.ErrFormat, ""},
		"streamed": {func(a *archive) {
			a.entries[1].flags, a.entries[1].descriptor = 8, descriptor(appData, true)
			a.entries[1].local = func(h []byte) { clear(h[14:26]) }
		}, bundle.ErrStreamed, "use the original file"},
		"streamed manifest": {func(a *archive) {
			a.entries[0].flags, a.entries[0].descriptor = 8, descriptor(plainManifest, true)
			a.entries[0].local = func(h []byte) { clear(h[14:26]) }
		}, bundle.ErrStreamed, "use the original file"},

		"nothing":               {func(a *archive) { a.entries = nil }, bundle.ErrNoManifest, "empty"},
		"no manifest":           {func(a *archive) { a.entries = a.entries[1:] }, bundle.ErrNoManifest, "app.bin"},
		"manifest second":       {func(a *archive) { a.entries[0], a.entries[1] = a.entries[1], a.entries[0] }, bundle.ErrNoManifest, "app.bin"},
		"manifest in caps":      {func(a *archive) { a.entries[0].name = "Manifest.json" }, bundle.ErrNoManifest, ""},
		"manifest twice":        {func(a *archive) { a.entries = append(a.entries, a.entries[0]) }, bundle.ErrDuplicate, ""},
		"manifest twice, other": {func(a *archive) { a.entries = append(a.entries, entry{name: "manifest.json", data: "{}"}) }, bundle.ErrDuplicate, ""},
		"manifest with suffix":  {func(a *archive) { a.entries[0].name = "manifest.json.sig" }, bundle.ErrNoManifest, ""},
		"manifest 2 levels in":  {func(a *archive) { a.entries[0].name = "a/b/manifest.json" }, bundle.ErrName, ""},
		"manifest too large": {func(a *archive) {
			a.entries[0].data += strings.Repeat(" ", 64<<10)
		}, bundle.ErrTooLarge, ""},
		"manifest of 4 GiB":       {local32(0, 18, 0xfffffffe), bundle.ErrFormat, ""},
		"manifest with wrong CRC": {func(a *archive) { both(&a.entries[0], 14, func(o int) func([]byte) { return put32(o, 1) }) }, bundle.ErrCRC, ""},
		"manifest with CRC 0":     {func(a *archive) { both(&a.entries[0], 14, func(o int) func([]byte) { return put32(o, 0) }) }, bundle.ErrCRC, ""},
		"file with CRC 0":         {func(a *archive) { both(&a.entries[1], 14, func(o int) func([]byte) { return put32(o, 0) }) }, bundle.ErrCRC, ""},
		"file with wrong CRC":     {func(a *archive) { both(&a.entries[2], 14, func(o int) func([]byte) { return put32(o, 9) }) }, bundle.ErrCRC, ""},
		"file missing":            {func(a *archive) { a.entries = a.entries[:2] }, bundle.ErrMissing, "fs.img"},
		"file twice":              {func(a *archive) { a.entries = append(a.entries, a.entries[1]) }, bundle.ErrDuplicate, ""},
		"file twice, in caps":     {func(a *archive) { a.entries = append(a.entries, entry{name: "APP.bin", data: appData}) }, bundle.ErrDuplicate, ""},
		"file in caps":            {rename("App.bin"), bundle.ErrExtraEntry, ""},
		"file longer":             {func(a *archive) { a.entries[1].data += "!" }, bundle.ErrSize, ""},
		"file shorter":            {func(a *archive) { a.entries[1].data = a.entries[1].data[1:] }, bundle.ErrSize, ""},
		"file of other content":   {func(a *archive) { a.entries[1].data = "The application" }, bundle.ErrDigest, ""},
		"file empty":              {func(a *archive) { a.entries[1].data = "" }, bundle.ErrFormat, "empty"},
		"extra file first":        {func(a *archive) { a.entries[1].name = "x" }, bundle.ErrExtraEntry, ""},
		"extra file last":         {func(a *archive) { a.entries = append(a.entries, entry{name: "x", data: "x"}) }, bundle.ErrExtraEntry, ""},
		"name with suffix":        {rename("app.bin.sig"), bundle.ErrExtraEntry, ""},
		"name with less":          {rename("app.bi"), bundle.ErrExtraEntry, ""},
		"Mac files":               {func(a *archive) { a.entries = append(a.entries, entry{name: "__MACOSX/._app.bin", data: "x"}) }, bundle.ErrExtraEntry, "Mac"},
		"Mac files first":         {func(a *archive) { a.entries[0].name = "__MACOSX/._manifest.json" }, bundle.ErrExtraEntry, "Mac"},
		"directory entry":         {rename("fw/"), bundle.ErrName, "zipped anew"},
		"one in a directory":      {rename("x/app.bin"), bundle.ErrName, "not in the directory"},
		"name ..":                 {rename(".."), bundle.ErrName, ""},
		"name .":                  {rename("."), bundle.ErrName, ""},
		"name empty":              {rename(""), bundle.ErrName, ""},
		"name ../app.bin":         {rename("../app.bin"), bundle.ErrName, ""},
		"name ./app.bin":          {rename("./app.bin"), bundle.ErrName, ""},
		"name /app.bin":           {rename("/app.bin"), bundle.ErrName, ""},
		"name //app.bin":          {rename("//app.bin"), bundle.ErrName, ""},
		"name ..\\app.bin":        {rename("..\\app.bin"), bundle.ErrName, ""},
		"name c:app.bin":          {rename("c:app.bin"), bundle.ErrName, ""},
		"name with NUL":           {rename("app.bin\x00"), bundle.ErrName, ""},
		"name with line feed":     {rename("app.bin\nx"), bundle.ErrName, `\n`},
		"name with ſ":             {rename("f\u017f.img"), bundle.ErrName, ""},
		"name not UTF-8":          {rename("app\xff.bin"), bundle.ErrName, ""},
		"name of 50 bytes":        {rename(strings.Repeat("x", 50)), bundle.ErrName, "49"},
		"name of 60000 bytes":     {rename(strings.Repeat("x", 60000)), bundle.ErrHeaderTooLong, ""},
		"directory of 129 bytes":  {func(a *archive) { a.entries[0].name = strings.Repeat("x", 129) + "/manifest.json" }, bundle.ErrName, ""},
		"name of 65535 bytes":     {func(a *archive) { a.entries[0].local = put16(26, 65535) }, bundle.ErrHeaderTooLong, ""},
		"deflated, it says":       {both16(1, 8, 8), bundle.ErrCorrupt, "compressed"},
		"method 1":                {both16(1, 8, 1), bundle.ErrCompressed, "use the original file"},
		"method 93":               {both16(1, 8, 93), bundle.ErrCompressed, "use the original file"},
		"encrypted":               {both16(1, 6, 1), bundle.ErrEncrypted, ""},
		"strongly encrypted":      {both16(1, 6, 1<<6), bundle.ErrEncrypted, ""},
		"masked":                  {both16(1, 6, 1<<13), bundle.ErrEncrypted, ""},
		"patched data flag":       {both16(1, 6, 1<<5), bundle.ErrFormat, "flags"},
		"version 4.5":             {both16(1, 4, 45), bundle.ErrZip64, ""},
		"version 2.1":             {both16(1, 4, 21), bundle.ErrFormat, ""},
		"zip64 sizes": {func(a *archive) {
			a.entries[1].local = func(h []byte) { put32(18, math.MaxUint32)(h); put32(22, math.MaxUint32)(h) }
		}, bundle.ErrZip64, ""},
		"zip64 extra":               {func(a *archive) { a.entries[1].extra = "\x01\x00\x04\x00abcd" }, bundle.ErrFormat, "extra"},
		"extra of another kind":     {func(a *archive) { a.entries[0].extra = "UT\x05\x00\x01abcd" }, bundle.ErrFormat, "extra"},
		"extra of two fields":       {func(a *archive) { a.entries[0].extra = "\x3a\x29\x02\x00{}\x3a\x29\x02\x00{}" }, bundle.ErrFormat, "extra"},
		"extra cut":                 {func(a *archive) { a.entries[0].extra = "\x3a\x29\x03\x00{}" }, bundle.ErrFormat, "extra"},
		"extra of 3 bytes":          {func(a *archive) { a.entries[0].extra = "\x3a\x29\x00" }, bundle.ErrFormat, "extra"},
		"extra not JSON":            {func(a *archive) { a.entries[0].extra = "\x3a\x29\x02\x00{]" }, bundle.ErrFormat, "extra"},
		"extra no object":           {func(a *archive) { a.entries[0].extra = "\x3a\x29\x02\x00[]" }, bundle.ErrFormat, "extra"},
		"extra, signature a number": {func(a *archive) { a.entries[0].extra = "\x3a\x29\x0a\x00{\"sig0\":1}" }, bundle.ErrSignature, ""},
		"extra, signature empty":    {func(a *archive) { a.entries[0].extra = "\x3a\x29\x0b\x00{\"sig0\":\"\"}" }, bundle.ErrSignature, ""},
		"extra, signature in caps":  {func(a *archive) { a.entries[0].extra = "\x3a\x29\x0b\x00{\"Sig0\":\"\"}" }, bundle.ErrFormat, ""},
		"extra empty object":        {func(a *archive) { a.entries[0].extra = "\x3a\x29\x02\x00{}" }, nil, ""},
		"extra not on the manifest": {func(a *archive) { a.entries[1].extra = "\x3a\x29\x02\x00{}" }, bundle.ErrFormat, "extra"},
		"extra of 3000 bytes": {func(a *archive) {
			a.entries[0].extra = "\x3a\x29\xb8\x0b{" + strings.Repeat(" ", 2998) + "}"
		}, bundle.ErrHeaderTooLong, ""},

		"sizes disagree":      {local32(1, 18, 14), bundle.ErrFormat, ""},
		"central name":        {func(a *archive) { a.entries[1].central = func(h []byte) { h[46] = 'x' } }, bundle.ErrMismatch, ""},
		"central size":        {central32(1, 24, 14), bundle.ErrMismatch, ""},
		"central packed size": {central32(1, 20, 14), bundle.ErrMismatch, ""},
		"central CRC":         {central32(1, 16, 0), bundle.ErrMismatch, ""},
		"central method":      {central16(1, 10, 8), bundle.ErrMismatch, ""},
		"central flags":       {central16(1, 8, 1), bundle.ErrMismatch, ""},
		"central time":        {central16(1, 12, 1), bundle.ErrMismatch, ""},
		"central version":     {central16(1, 6, 10), bundle.ErrMismatch, ""},
		"central extra": {func(a *archive) {
			a.entries[0].extra = "\x3a\x29\x02\x00{}"
			a.entries[0].central = func(h []byte) { h[len(h)-1] = 'x' }
		}, bundle.ErrMismatch, ""},
		"central offset":           {central32(1, 42, 0), bundle.ErrMismatch, "offset"},
		"central comment":          {func(a *archive) { a.entries[2].dir = func(b []byte) []byte { put16(32, 1)(b); return append(b, 'x') } }, bundle.ErrFormat, "comment"},
		"central volume":           {central16(1, 34, 1), bundle.ErrFormat, "volumes"},
		"central directory bit":    {central32(1, 38, 0x10), bundle.ErrFormat, "regular"},
		"central symbolic link":    {func(a *archive) { a.entries[1].central = func(h []byte) { h[5] = 3; put32(38, 0120777<<16)(h) } }, bundle.ErrFormat, "regular"},
		"central name of 60000":    {central16(1, 28, 60000), bundle.ErrHeaderTooLong, ""},
		"entry not in directory":   {func(a *archive) { a.entries[1].noDir = true }, bundle.ErrMismatch, ""},
		"last not in directory":    {func(a *archive) { a.entries[2].noDir = true }, bundle.ErrMismatch, "fs.img"},
		"none in directory":        {func(a *archive) { a.entries[0].noDir, a.entries[1].noDir, a.entries[2].noDir = true, true, true }, bundle.ErrFormat, ""},
		"one more in directory":    {func(a *archive) { a.entries[2].dir = func(b []byte) []byte { return append(b, b...) } }, bundle.ErrMismatch, "more"},
		"directory in other order": {func(a *archive) { swap(&a.entries[1], &a.entries[2]) }, bundle.ErrMismatch, ""},
		"junk before":              {func(a *archive) { a.before = "#!/bin/sh\n" }, bundle.ErrNotZip, ""},
		"junk after":               {func(a *archive) { a.end = func(b []byte) []byte { return append(b, 0) } }, bundle.ErrTrailing, ""},
		"second end record":        {func(a *archive) { a.end = func(b []byte) []byte { return append(b, b...) } }, bundle.ErrTrailing, ""},
		"gap":                      {func(a *archive) { a.entries[1].between = "\x00" }, bundle.ErrFormat, ""},
		"gap before the directory": {func(a *archive) { a.entries[2].between = "junk" }, bundle.ErrFormat, `"junk"`},
		"comment":                  {func(a *archive) { a.end = func(b []byte) []byte { put16(20, 1)(b); return append(b, 'x') } }, bundle.ErrFormat, "comment"},
		"end record in the comment": {func(a *archive) {
			a.end = func(b []byte) []byte { put16(20, 22)(b); return append(b, (&archive{}).bytes()...) }
		}, bundle.ErrFormat, "comment"},
		"end, volumes":             {end(put16(4, 1)), bundle.ErrFormat, "volumes"},
		"end, volume of directory": {end(put16(6, 1)), bundle.ErrFormat, "volumes"},
		"end, entries":             {end(put16(8, 2)), bundle.ErrMismatch, "entries"},
		"end, all entries":         {end(put16(10, 2)), bundle.ErrMismatch, "entries"},
		"end, size":                {end(put32(12, 0)), bundle.ErrMismatch, "directory of"},
		"end, offset":              {end(put32(16, 0)), bundle.ErrMismatch, "directory of"},
		"end, zip64 record":        {func(a *archive) { a.end = func(b []byte) []byte { return append([]byte("PK\x06\x06"), b...) } }, bundle.ErrZip64, ""},
		"overlap": {func(a *archive) {
			// app.bin's data holds the whole entry of fs.img, which the directory lists.
			inner := string((&archive{entries: []entry{{name: "fs.img", data: fsData}}}).bytes()[:30+6+len(fsData)])
			a.entries[0].data = fmt.Sprintf(`{"parts":{"app":{"src":"app.bin","size":%d,"cs_sha256":%q},"fs":{"src":"fs.img","size":%d,"cs_sha256":%q}}}`,
				len(inner), sum256(inner), len(fsData), sum256(fsData))
			a.entries[1].data = inner
		}, nil, ""},
		"overlap, fs.img inside only": {func(a *archive) {
			inner := string((&archive{entries: []entry{{name: "fs.img", data: fsData}}}).bytes()[:30+6+len(fsData)])
			a.entries[0].data = fmt.Sprintf(`{"parts":{"app":{"src":"app.bin","size":%d,"cs_sha256":%q},"fs":{"src":"fs.img","size":%d,"cs_sha256":%q}}}`,
				len(inner), sum256(inner), len(fsData), sum256(fsData))
			a.entries[1].data = inner
			a.entries = a.entries[:2]
		}, bundle.ErrMissing, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := good()
			c.change(a)
			file := a.bytes()
			got, _, err := content(t.Context(), lax, bytes.NewReader(file))
			_, verr := lax.Verify(t.Context(), bytes.NewReader(file))
			if c.err == nil {
				require.NoError(t, err)
				require.NoError(t, verr)
				require.Len(t, got, 2)
				require.Equal(t, fsData, got["fs"])
				sameAsStandardLibrary(t, file)
				return
			}
			require.ErrorIs(t, err, c.err)
			require.ErrorIs(t, verr, c.err)
			var e *bundle.Error
			require.ErrorAs(t, err, &e)
			require.ErrorContains(t, err, c.text)
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 300)
		})
	}
}

// swap exchanges the entries of a and b in the directory.
func swap(a, b *entry) {
	var first []byte
	a.dir = func(c []byte) []byte { first = c; return nil }
	b.dir = func(c []byte) []byte { return append(c, first...) }
}

// Hostile bundles cost little.
func TestBounded(t *testing.T) {
	many := good()
	for i := range 100000 {
		many.entries = append(many.entries, entry{name: fmt.Sprint("f", i), data: "x"})
	}
	big := func(s string) []byte {
		return (&archive{entries: []entry{{name: "manifest.json", data: s[:min(len(s), 64<<10)]}}}).bytes()
	}
	members := func(f string) string {
		var b strings.Builder
		for i := 0; b.Len() < 64<<10-100; i++ {
			fmt.Fprintf(&b, f, i)
		}
		return strings.TrimSuffix(b.String(), ",")
	}
	parts := "{\"parts\":{" + members(`"p%d":{"size":1048576,"fill":1},`) + "}}"
	var fill strings.Builder
	for i := range 16 {
		fmt.Fprintf(&fill, `"p%d":{"size":1048576,"fill":1},`, i)
	}
	for name, file := range map[string][]byte{
		"100000 entries":     many.bytes(),
		"nested":             big(strings.Repeat("[", 64<<10)),
		"nested objects":     big(strings.Repeat(`{"":`, 16<<10)),
		"many members":       big("{" + members(`"%x":0,`) + "}"),
		"many members below": big(`{"x":{` + members(`"%x":{},`) + "}}"),
		"many elements":      big("[" + strings.Repeat("0,", 32<<10-2) + "0]"),
		"many strings":       big(`{"x":["` + strings.Repeat(`","`, 20<<10) + `"]}`),
		"escapes":            big(`{"x":"` + strings.Repeat(`\ud800`, 10<<10) + `"}`),
		"many parts":         big(parts),
		"most fill":          big(`{"parts":{` + strings.TrimSuffix(fill.String(), ",") + `}}`),
		"endless headers":    bytes.Repeat(good().bytes()[:30+13+len(plainManifest)], 10000),
		"4 GiB of manifest": with(func(a *archive) {
			a.entries[0].local = func(h []byte) { put32(18, 0xfffffffe)(h); put32(22, 0xfffffffe)(h) }
		}).bytes(),
		"4 GiB of file": with(func(a *archive) {
			a.entries[1].local = func(h []byte) { put32(18, 0xfffffffe)(h); put32(22, 0xfffffffe)(h) }
		}).bytes(),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := lax.Verify(t.Context(), bytes.NewReader(file))
		runtime.ReadMemStats(&after)
		if name != "most fill" {
			require.Error(t, err, name)
		} else {
			require.NoError(t, err)
		}
		used := after.TotalAlloc - before.TotalAlloc
		t.Logf("%-20s %7d bytes allocated: %v", name, used, err)
		require.Less(t, used, uint64(8<<20), name)
	}
}
