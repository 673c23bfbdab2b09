package main

import (
	"archive/zip"
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
)

// archive is an open bundle that was found to be intact.
type archive struct {
	f    *os.File
	size int64
	r    *bundle.Reader
	zip  *zip.Reader // for the places of the data
	sigs [bundle.MaxKeys][]byte
	note *trust.Note // or nil
	open []*content
}

// signed says whether there is any signature.
func (a *archive) signed() bool {
	return a.note != nil || slices.ContainsFunc(a.sigs[:], func(s []byte) bool { return s != nil })
}

// openArchive opens a bundle and verifies it, without regard to signatures.
func openArchive(ctx context.Context, name string) (*archive, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	a := &archive{f: f}
	if err := a.read(ctx); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

func (a *archive) read(ctx context.Context) error {
	info, err := a.f.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("not a regular file: %w", ota.ErrInvalid)
	}
	a.size = info.Size()
	anybody := &bundle.Policy{AllowUnsigned: true, AllowSHA1: true, MaxWindow: bundle.MaxFrame, MaxIndex: maxIndex}
	if a.r, err = anybody.Verify(ctx, io.NewSectionReader(a.f, 0, a.size)); err != nil {
		return err
	}
	if a.zip, err = zip.NewReader(a.f, a.size); err != nil {
		return err
	}
	if x := a.zip.File[0].Extra; len(x) > 4 { // the id and length of the only field
		if a.sigs, err = bundle.Signatures(x[4:]); err == nil {
			a.note, err = bundle.Note(x[4:])
		}
	}
	return err
}

// maxIndex is the most that a [bundle.Policy] permits.
const maxIndex = 64 << 20

func (a *archive) Close() error {
	for _, c := range a.open {
		c.close()
	}
	return a.f.Close()
}

// dir returns the leading directory of the names, without its slash.
func (a *archive) dir() string {
	return strings.TrimSuffix(a.zip.File[0].Name, bundle.ManifestName)
}

// entry returns the entry that holds the data of p, nil if it has none.
func (a *archive) entry(p *bundle.Part) *zip.File {
	for _, z := range a.zip.File[1:] {
		if p.Src != "" && z.Name == a.dir()+p.Src {
			return z
		}
	}
	return nil
}

// packing returns how p is stored.
func (a *archive) packing(p *bundle.Part) bundle.Packing {
	if z := a.entry(p); p.Storage == nil && z != nil && z.Method == zip.Deflate {
		return bundle.Packing{Encoding: bundle.EncodingDeflate} // by a tool that has no more to say
	}
	return p.Packing()
}

// files returns what the parts install by Src, but for the index.
func (a *archive) files() (map[string]bundle.File, error) {
	files := map[string]bundle.File{}
	m := a.r.Manifest()
	for i := range m.Parts {
		p := &m.Parts[i]
		z := a.entry(p)
		if z == nil || p.Name == m.Index {
			continue
		}
		off, err := z.DataOffset()
		if err != nil {
			return nil, err
		}
		stored := io.NewSectionReader(a.f, off, int64(z.CompressedSize64))
		c := &content{size: p.Size, open: z.Open}
		if a.packing(p).Encoding == bundle.EncodingZstd {
			c.open = func() (io.ReadCloser, error) { return unzstd(io.NewSectionReader(stored, 0, stored.Size())) }
		} else if z.Method == zip.Store {
			files[p.Src] = stored
			continue
		}
		a.open = append(a.open, c)
		files[p.Src] = c
	}
	return files, nil
}

func unzstd(r io.Reader) (io.ReadCloser, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(bundle.MaxFrame))
	if err != nil {
		return nil, err
	}
	return z.IOReadCloser(), nil
}

// content is what a compressed part installs, for those who read it from its
// beginning to its end: to go back means to decode it again. It is not for
// concurrent use.
type content struct {
	size int64
	open func() (io.ReadCloser, error)
	r    io.ReadCloser // nil if there is none
	off  int64         // what r yields next
}

// Size implements [bundle.File].
func (c *content) Size() int64 { return c.size }

// ReadAt implements [bundle.File].
func (c *content) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, ota.ErrInvalid
	}
	if off >= c.size {
		return 0, io.EOF
	}
	if c.r == nil || off < c.off {
		c.close()
		if c.r, err = c.open(); err != nil {
			return 0, err
		}
		c.off = 0
	}
	skipped, err := io.CopyN(io.Discard, c.r, off-c.off)
	if c.off += skipped; err != nil {
		return 0, whole(err)
	}
	want := p[:min(int64(len(p)), c.size-off)]
	n, err = io.ReadFull(c.r, want)
	if c.off += int64(n); err == nil && len(want) < len(p) {
		return n, io.EOF
	}
	return n, whole(err)
}

// whole returns err, or what it means if nothing may be missing.
func whole(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *content) close() {
	if c.r != nil {
		c.r.Close()
		c.r = nil
	}
}

// writeFile makes the file name, or replaces it, with what write writes: nobody
// ever sees a part of it. - is the standard output. What is no regular file, such as
// a device, is not replaced but written to, and so is what a link leads to.
func (e *env) writeFile(name string, write func(io.Writer) error) (err error) {
	if name == "-" {
		return write(e.stdout)
	}
	if special(name) {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		b := bufio.NewWriterSize(f, 64<<10)
		if err = write(b); err == nil {
			err = b.Flush()
		}
		return errors.Join(err, f.Close())
	}
	if to, err := filepath.EvalSymlinks(name); err == nil {
		name = to
	}
	tmp := fmt.Sprintf("%s.%08x~", name, rand.Uint32())
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(tmp)
		}
	}()
	b := bufio.NewWriterSize(f, 64<<10)
	for _, step := range []func() error{func() error { return write(b) }, b.Flush, f.Sync, f.Close} {
		if err := step(); err != nil {
			return err
		}
	}
	return os.Rename(tmp, name)
}

// special says whether there is something of that name that is no regular file.
func special(name string) bool {
	info, err := os.Stat(name)
	return err == nil && !info.Mode().IsRegular()
}

// otherThan reports an error if out is one of the files, which are read, too.
func otherThan(out string, files ...string) error {
	to, err := os.Stat(out)
	if err != nil || !to.Mode().IsRegular() {
		return nil // nothing to lose
	}
	for _, name := range files {
		if info, err := os.Stat(name); err == nil && os.SameFile(info, to) {
			return usagef("%s: it is read, so -o must be another file", name)
		}
	}
	return nil
}

// scratch makes a temporary file beside the file name, to be removed by remove.
func scratch(name string) (f *os.File, remove func(), err error) {
	dir, base := filepath.Split(name)
	if name == "-" || special(name) {
		dir, base = os.TempDir(), "ota"
	} else if dir == "" {
		dir = "."
	}
	if f, err = os.CreateTemp(dir, base+".*~"); err != nil {
		return nil, nil, err
	}
	return f, func() {
		f.Close()
		os.Remove(f.Name())
	}, nil
}

// writeNew makes the file name, which must not exist.
func writeNew(name string, perm os.FileMode, content []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// indexed distributes values of the form [INDEX=]FILE over the places of keys.
// Those without an index take the first places that are free.
func indexed(l list, taken func(int) bool) (files [bundle.MaxKeys]string, err error) {
	var unnumbered []string
	for _, v := range l {
		number, file, ok := strings.Cut(v, "=")
		n, err := strconv.ParseUint(number, 10, 8)
		switch {
		case !ok || err != nil:
			unnumbered = append(unnumbered, v)
		case n >= bundle.MaxKeys:
			return files, usagef("key %s: need an index from 0 to %d", ota.Quote(v), bundle.MaxKeys-1)
		case files[n] != "":
			return files, usagef("two keys of index %d", n)
		default:
			files[n] = file
		}
	}
	i := 0
	for _, v := range unnumbered {
		for i < len(files) && (files[i] != "" || taken != nil && taken(i)) {
			i++
		}
		if i == len(files) {
			return files, usagef("no place is free for key %s", ota.Quote(v))
		}
		files[i] = v
	}
	return files, nil
}

// signers reads private keys, none of which may be the file out.
func signers(out string, l list, taken func(int) bool) ([]crypto.Signer, error) {
	names, err := indexed(l, taken)
	if err != nil {
		return nil, err
	}
	if err := otherThan(out, names[:]...); err != nil {
		return nil, err
	}
	keys := make([]crypto.Signer, len(names))
	for i, name := range names {
		if name == "" {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if keys[i], err = parsePrivate(b); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return keys, nil
}

func parsePrivate(b []byte) (crypto.Signer, error) {
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			return nil, errors.New("no private key in PEM form")
		}
		b = rest
		switch block.Type {
		case "EC PRIVATE KEY":
			return x509.ParseECPrivateKey(block.Bytes)
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			if k, ok := k.(*ecdsa.PrivateKey); ok {
				return k, nil
			}
			return nil, errors.New("not a P-256 key")
		}
	}
}

// verifiers reads public keys.
func verifiers(l list) (keys []*ecdsa.PublicKey, names [bundle.MaxKeys]string, err error) {
	if names, err = indexed(l, nil); err != nil {
		return nil, names, err
	}
	keys = make([]*ecdsa.PublicKey, len(names))
	for i, name := range names {
		if name == "" {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, names, err
		}
		if keys[i], err = bundle.ParseKey(b); err != nil {
			return nil, names, fmt.Errorf("%s: %w", name, err)
		}
	}
	return keys, names, nil
}

// policyFlags define which bundles are accepted.
type policyFlags struct {
	keys                     list
	required                 uint
	threshold                int
	allowUnsigned, allowSHA1 bool
	trust                    string
	window                   sizeFlag
}

func (p *policyFlags) define(fs *flag.FlagSet) {
	fs.Var(&p.keys, "key", "public key, PEM or as update.keyN of Mongoose OS; several: all must have signed. `[INDEX=]FILE`")
	fs.StringVar(&p.trust, "trust", "", "trust record, or a chain of them: enough of its release keys must have signed the note: `FILE`")
	fs.UintVar(&p.required, "required", 0, "bit `mask` of the indices that must have signed, in place of all (update.sig_req_mask)")
	fs.IntVar(&p.threshold, "threshold", 0, "how many of the keys must have signed, in place of all: `N`")
	fs.BoolVar(&p.allowUnsigned, "allow-unsigned", false, "accept bundles that nobody has signed")
	fs.Var(&p.window, "max-window", "most bytes that a zstd frame may have, decoded, which it takes memory to decode: `SIZE`; else 8M")
	fs.BoolVar(&p.allowSHA1, "allow-sha1", false, "accept unsigned bundles with SHA-1 only, as made before 2020")
}

func (p *policyFlags) policy() (*bundle.Policy, error) {
	if len(p.keys) == 0 && p.trust == "" && !p.allowUnsigned {
		return nil, usagef("need a -key, a -trust record, or -allow-unsigned")
	}
	if p.required > math.MaxUint8 {
		return nil, usagef("-required: at most 255")
	}
	policy := &bundle.Policy{Required: uint8(p.required), Threshold: p.threshold, Clock: hostClock,
		AllowUnsigned: p.allowUnsigned, AllowSHA1: p.allowSHA1, MaxWindow: p.window.or(0)}
	var err error
	if policy.Keys, _, err = verifiers(p.keys); err == nil && p.trust != "" {
		policy.Trust, err = openTrust(p.trust)
	}
	return policy, err
}

// parseSize reads a number of bytes, such as 16384, 0x4000, 16K or 64M.
func parseSize(s string) (int64, error) {
	shift := 0
	if n := len(s) - 1; n > 0 {
		if i := strings.IndexByte("KMG", s[n]&^0x20); i >= 0 && !strings.HasPrefix(s, "0x") {
			shift, s = 10*(i+1), s[:n]
		}
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size %s: need a number of bytes, such as 16384, 16K or 64M", ota.Quote(s))
	}
	return n << shift, nil
}

// sizeFlag is a number of bytes that may be left out.
type sizeFlag struct{ n *int64 }

// String implements [flag.Value].
func (f *sizeFlag) String() string { return "" }

// Set implements [flag.Value].
func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	f.n = &n
	return err
}

// or returns the size, or instead if there is none.
func (f *sizeFlag) or(instead int64) int64 {
	if f.n == nil {
		return instead
	}
	return *f.n
}

// sizeText returns n in the way that it is given to the tool.
func sizeText(n int64) string {
	for i, unit := range []string{"G", "M", "K"} {
		if shift := 10 * (3 - i); n != 0 && n%(1<<shift) == 0 {
			return strconv.FormatInt(n>>shift, 10) + unit
		}
	}
	return strconv.FormatInt(n, 10)
}

// jsonValue returns the JSON that the text of a property stands for: true, false,
// an integer in any base, a quoted string, or else a string, as in mos.
func jsonValue(s string) json.RawMessage {
	if s == "true" || s == "false" {
		return json.RawMessage(s)
	}
	if n, err := strconv.ParseInt(s, 0, 64); err == nil {
		return strconv.AppendInt(nil, n, 10)
	}
	if u, err := strconv.Unquote(s); err == nil && s[0] == '"' {
		s = u
	}
	b, _ := json.Marshal(s) // cannot fail for a string
	return b
}

// attributes reads flags of the form NAME=VALUE.
func attributes(l list, m *map[string]json.RawMessage) error {
	for _, v := range l {
		k, v, ok := strings.Cut(v, "=")
		if !ok || k == "" {
			return usagef("attribute %s: need NAME=VALUE", ota.Quote(k))
		}
		if *m == nil {
			*m = map[string]json.RawMessage{}
		}
		(*m)[k] = jsonValue(v)
	}
	return nil
}

// printJSON prints v for machines.
func (e *env) printJSON(v any) error {
	j := json.NewEncoder(e.stdout)
	j.SetEscapeHTML(false)
	j.SetIndent("", "  ")
	return j.Encode(v)
}

// bar is a progress bar on a terminal, and nothing elsewhere.
type bar struct {
	e     *env
	label string
	next  time.Time
	shown bool
}

func (e *env) bar(label string) *bar { return &bar{e: e, label: label} }

// show shows done of total, at most ten times per second.
func (b *bar) show(done, total int64) {
	if !b.e.terminal || total <= 0 || done < total && time.Now().Before(b.next) {
		return
	}
	b.next = time.Now().Add(100 * time.Millisecond)
	part := min(1, float64(done)/float64(total))
	fmt.Fprintf(b.e.stderr, "\r%-10s [%-40s] %3.0f %%", b.label, strings.Repeat("#", int(40*part)), 100*part)
	b.shown = true
}

// end leaves the line of the bar.
func (b *bar) end() {
	if b.shown {
		fmt.Fprintln(b.e.stderr)
		b.shown = false
	}
}

// counted reports what is read of a file.
type counted struct {
	bundle.File
	count func(n int)
}

func (c counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.File.ReadAt(p, off)
	c.count(n)
	return n, err
}
