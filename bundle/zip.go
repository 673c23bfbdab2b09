package bundle

import (
	"bytes"
	"encoding/binary"
	"strings"

	"github.com/slotota/ota"
)

// Fixed parts of the three kinds of records, from PKWARE's APPNOTE.TXT 6.3.10,
// sections 4.3.7, 4.3.12 and 4.3.16. All numbers are little endian.
const (
	sigLocal      = 0x04034b50
	sigDescriptor = 0x08074b50
	sigCentral    = 0x02014b50
	sigEnd        = 0x06054b50
	sigEnd64      = 0x06064b50

	lenLocal   = 30
	lenCentral = 46
	lenEnd     = 22
	// The longest data descriptor that is accepted.
	lenDescriptor = 16

	// The fields from "version needed" to "extra field length" have the same
	// layout in local headers and in the directory, at these offsets.
	sharedLocal, sharedCentral, lenShared = 4, 6, 26

	flagEncrypted  = 1 << 0
	flagDescriptor = 1 << 3
	flagStrong     = 1 << 6
	flagUTF8       = 1 << 11
	flagMasked     = 1 << 13

	methodStored  = 0
	methodDeflate = 8
)

var le = binary.LittleEndian

// entry is what is remembered of a local header.
type entry struct {
	off        int64  // of the header
	raw        []byte // the header with name and extra field
	name       string // without the leading directory
	dir        string // the leading directory with its slash, or ""
	extra      []byte
	crc        uint32
	packed     int64 // bytes in the archive
	size       int64 // of them, once inflated
	method     uint16
	descriptor bool
}

// parseLocal reads a local header; raw is all of it.
func parseLocal(raw []byte, off int64) (*entry, error) {
	e := &entry{off: off, raw: raw, crc: le.Uint32(raw[14:])}
	n := lenLocal + int(le.Uint16(raw[26:]))
	full := string(raw[lenLocal:n])
	e.extra = raw[n:]
	e.name = full
	if i := strings.IndexByte(full, '/'); i >= 0 {
		e.dir, e.name = full[:i+1], full[i+1:]
	}

	need, flags, method := le.Uint16(raw[4:]), le.Uint16(raw[6:]), le.Uint16(raw[8:])
	packed, size := le.Uint32(raw[18:]), le.Uint32(raw[22:])
	e.packed, e.size, e.method = int64(packed), int64(size), method
	e.descriptor = flags&flagDescriptor != 0
	switch {
	case strings.HasPrefix(full, "__MACOSX/"):
		return e, because(ErrExtraEntry, "a Mac zipped the archive anew and added files of its own; use the original file")
	case strings.HasSuffix(full, "/"):
		return e, because(ErrName, "a directory has an entry of its own because the archive was zipped anew; use the original file")
	case flags&(flagEncrypted|flagStrong|flagMasked) != 0:
		return e, ErrEncrypted
	case packed == 0xffffffff || size == 0xffffffff:
		return e, ErrZip64
	case e.descriptor && (packed == 0 || size == 0):
		return e, ErrStreamed
	case method != methodStored && method != methodDeflate:
		return e, because(ErrCompressed, "method %d", method)
	case flags&^(flagDescriptor|flagUTF8) != 0:
		return e, because(ErrFormat, "flags %#04x", flags)
	case need >= 45:
		return e, ErrZip64
	case need > 20:
		return e, because(ErrFormat, "version %d.%d is needed", need/10, need%10)
	case method == methodStored && packed != size:
		return e, because(ErrFormat, "sizes %d and %d of a stored entry", packed, size)
	case size == 0 || packed == 0:
		return e, because(ErrFormat, "the entry is empty")
	case len(e.name) > MaxName:
		return e, because(ErrName, "longer than %d bytes", MaxName)
	case !plain(e.name, MaxName), e.dir != "" && !plain(e.dir[:len(e.dir)-1], maxDir):
		return e, ErrName
	}
	return e, nil
}

// signatures returns the content of the manifest's extra field, nil if it has
// none. No other field is accepted, because any may change what others read.
func (e *entry) signatures() ([]byte, error) {
	x := e.extra
	if len(x) == 0 {
		return nil, nil
	}
	if len(x) < 4 || int(le.Uint16(x[2:])) != len(x)-4 || le.Uint16(x) != extraID {
		return nil, because(ErrFormat, "an extra field other than %#04x", extraID)
	}
	return x[4:], nil
}

// checkCentral holds an entry of the directory against the local header.
func (e *entry) checkCentral(raw []byte) error {
	shared := raw[sharedCentral : sharedCentral+lenShared]
	host, mode := raw[5], le.Uint32(raw[38:])
	const typeMask, regular = 0xf000, 0x8000 // of the upper half, if from Unix
	switch {
	case !bytes.Equal(shared, e.raw[sharedLocal:sharedLocal+lenShared]),
		!bytes.Equal(raw[lenCentral:], e.raw[lenLocal:]):
		return ErrMismatch
	case int64(le.Uint32(raw[42:])) != e.off:
		return because(ErrMismatch, "offset %d instead of %d", le.Uint32(raw[42:]), e.off)
	case le.Uint16(raw[32:]) != 0:
		return because(ErrFormat, "the entry has a comment")
	case le.Uint16(raw[34:]) != 0:
		return because(ErrFormat, "the archive has several volumes")
	case mode&0x10 != 0, host == 3 && mode>>16&typeMask != 0 && mode>>16&typeMask != regular:
		return because(ErrFormat, "the entry is no regular file")
	}
	return nil
}

// madeBy is what the tools that sign write there: version 2.0, no system.
const madeBy = 20

// bare says whether an entry of the directory has nothing in the fields that no
// device looks at: who made it, and the attributes.
func bare(raw []byte) bool {
	return le.Uint16(raw[4:]) == madeBy && le.Uint16(raw[36:]) == 0 && le.Uint32(raw[38:]) == 0
}

// checkEnd holds the end record against what came before it.
func checkEnd(raw []byte, entries int, dir, dirSize int64) error {
	switch {
	case le.Uint32(raw[4:]) != 0:
		return because(ErrFormat, "the archive has several volumes")
	case int(le.Uint16(raw[8:])) != entries, int(le.Uint16(raw[10:])) != entries:
		return because(ErrMismatch, "%d and %d entries instead of %d", le.Uint16(raw[8:]), le.Uint16(raw[10:]), entries)
	case int64(le.Uint32(raw[12:])) != dirSize, int64(le.Uint32(raw[16:])) != dir:
		return because(ErrMismatch, "directory of %d bytes at %d instead of %d at %d",
			le.Uint32(raw[12:]), le.Uint32(raw[16:]), dirSize, dir)
	case le.Uint16(raw[20:]) != 0:
		return because(ErrFormat, "the archive has a comment")
	}
	return nil
}

// checkDescriptor returns the length of the data descriptor that b begins
// with. The one with a signature goes first: the other could only be taken
// for it if the next record began with its own size.
func checkDescriptor(b []byte, crc uint32, e *entry) (int, error) {
	want := le.AppendUint32(nil, sigDescriptor)
	want = le.AppendUint32(want, crc)
	want = le.AppendUint32(want, uint32(e.packed))
	want = le.AppendUint32(want, uint32(e.size))
	if bytes.HasPrefix(b, want) {
		return len(want), nil
	}
	if bytes.HasPrefix(b, want[4:]) {
		return len(want) - 4, nil
	}
	return 0, because(ErrCRC, "or the data descriptor is malformed")
}

// unknown says what stands where a record should be.
func unknown(sig uint32) error {
	if sig == sigEnd64 {
		return ErrZip64
	}
	return because(ErrFormat, "no archive record but %s", ota.Quote(string(le.AppendUint32(nil, sig))))
}
