package bundle

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/slotota/ota"
)

// sentinel is an error value that is also another one.
type sentinel struct {
	text string
	is   error
}

func (s *sentinel) Error() string { return s.text }
func (s *sentinel) Unwrap() error { return s.is }

// Sentinel errors, for [errors.Is]. Those that have a counterpart in package
// ota wrap it.
var (
	ErrPolicy error = &sentinel{"the policy contradicts itself or is empty", ota.ErrInvalid}

	ErrTruncated error = &sentinel{"the archive ends too early", io.ErrUnexpectedEOF}

	ErrNotZip        = errors.New("not a zip archive")
	ErrFormat        = errors.New("malformed archive")
	ErrTrailing      = errors.New("there is something after the end of the archive")
	ErrHeaderTooLong = errors.New("an archive header is too long")
	ErrMismatch      = errors.New("the archive's directory contradicts its entries")
	ErrCompressed    = errors.New("the archive was re-compressed in a way that is not supported; use the original file")
	ErrStreamed      = errors.New("the archive does not say how long its entries are because it was zipped anew; use the original file")
	ErrZip64         = errors.New("zip64 archives are not supported")
	ErrEncrypted     = errors.New("the archive is encrypted")
	ErrDuplicate     = errors.New("the archive has two entries of the same name")
	ErrName          = errors.New("the entry's name is not a plain file name")
	ErrNoManifest    = errors.New("the first entry is not manifest.json; use the original file if the archive was zipped anew")
	ErrExtraEntry    = errors.New("the entry is not in the manifest")
	ErrMissing       = errors.New("a file that the manifest names is not in the archive")

	ErrManifest = errors.New("bad manifest")
	ErrIndex    = errors.New("bad index of frames and chunks")
	ErrCorrupt  = errors.New("compressed data are damaged, or not what the manifest says")
	ErrNoDigest = errors.New("a part has no acceptable digest")
	ErrSize     = errors.New("the entry's size is not the one in the manifest")
	ErrCRC      = errors.New("the CRC-32 is wrong")

	ErrUnsupported error = &sentinel{"made for another version of this software", ota.ErrUnsupported}

	ErrTooLarge  error = &sentinel{"too large", ota.ErrTooLarge}
	ErrDigest    error = &sentinel{"the digest is wrong", ota.ErrDigest}
	ErrUnsigned  error = &sentinel{"the bundle is not signed as required", ota.ErrUnverified}
	ErrSignature error = &sentinel{"a signature is wrong", ota.ErrUnverified}
)

// errNoParts has a text of its own on the wire.
var errNoParts error = &sentinel{"the manifest has no parts", ErrManifest}

// errClosed is what everything yields after Close.
var errClosed error = &sentinel{"the reader is closed", io.ErrClosedPipe}

// errStale is what the data of a part yields after the next call of Next.
var errStale = errors.New("the data was read after the next part was asked for")

// Error says what is wrong with a bundle, and where. Err is never nil.
type Error struct {
	Entry string // name of the archive's entry concerned, or ""
	Off   int64  // byte offset inside the archive, or -1
	Err   error
}

// Error formats e on one line; outside strings are quoted and cut.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("bundle: ")
	if e.Entry != "" {
		b.WriteString(ota.Quote(e.Entry))
		b.WriteString(": ")
	}
	if e.Off >= 0 {
		b.WriteString("at byte ")
		b.WriteString(strconv.FormatInt(e.Off, 10))
		b.WriteString(": ")
	}
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// codes are the results that Mongoose OS devices of 2020 and later give for
// the same faults (prebuilt libraries of mongoose-os-libs/ota-common).
var codes = []struct {
	err  error
	code int
	text string
}{
	{ErrUnsigned, -18, "Signature verification failed"},
	{ErrSignature, -18, "Signature verification failed"},
	{ErrHeaderTooLong, -15, "ZIP header too long"},
	{ErrDigest, -12, "Invalid checksum"},
	{ErrCRC, -11, "Invalid CRC"},
	{ErrNoDigest, -1, "Invalid file checksum format"},
	{ErrStreamed, -1, "Archived file size is unknown"},
	{ErrCompressed, -1, "Compressed ZIP files are not supported"},
	{ErrExtraEntry, -1, "Extra file in bundle"},
	{ErrSize, -1, "File size mismatch"},
	{ErrNoManifest, -1, "Expected manifest, found something else"},
	{errNoParts, -1, "Required manifest field missing"},
	{ErrManifest, -1, "Failed to parse manifest"},
	{ErrTruncated, -1, "Unexpected end of data"},
	{ErrNotZip, -1, "Malformed archive (invalid header)"},
	{ErrFormat, -1, "Malformed archive"},
}

// MongooseCode returns the result code and text by which a Mongoose OS device
// reports the same fault, or -1 and the text of e where it has none.
func (e *Error) MongooseCode() (code int, text string) {
	for _, c := range codes {
		if errors.Is(e.Err, c.err) {
			return c.code, c.text
		}
	}
	return -1, e.Error()
}

// because adds the particulars to a sentinel.
func because(sentinel error, format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{sentinel}, args...)...)
}
