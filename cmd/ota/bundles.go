package main

import (
	"archive/zip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
)

func keygen(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	out := fs.String("o", "", "`file` for the private key; the public one gets .pub.pem in place of .pem, or .pub in place of .key")
	kind := fs.String("type", "ecdsa", "`kind` of the key: ecdsa, which Mongoose OS knows, or note, for signed notes and trust records")
	name := fs.String("name", "", "`name` of a key of type note, such as release-2026")
	public := fs.String("public", "", "the key is kept elsewhere: write only the public key, from this PEM `file`, in the form of type note")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		if *out == "" {
			return usagef("need -o FILE")
		}
		switch {
		case *kind == "note":
			return e.keygenNote(*out, *name, *public)
		case *kind != "ecdsa":
			return usagef("-type: %s: need ecdsa or note", ota.Quote(*kind))
		case *name != "" || *public != "":
			return usagef("-name and -public go with -type note")
		}
		public := strings.TrimSuffix(*out, ".pem") + ".pub.pem"
		for _, name := range []string{*out, public} {
			if _, err := os.Lstat(name); err == nil {
				return fail(exitFailed, "keys are never overwritten; choose another name", "%s exists", name)
			}
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			return err
		}
		id, err := bundle.KeyID(&key.PublicKey)
		if err != nil {
			return err
		}
		if err := writeNew(*out, 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})); err != nil {
			return err
		}
		if err := writeNew(public, 0o644, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})); err != nil {
			return err
		}
		e.printf("private  %s\npublic   %s\nid       %s\n", *out, public, id[:16])
		e.printf("device   %s\n", base64.StdEncoding.EncodeToString(spki))
		e.notef("hint: the line device is what update.key0 of Mongoose OS takes. Keep a copy of %s in a safe place", *out)
		return nil
	}
}

// creation is what ota create has been told.
type creation struct {
	out, from, dir, prefix string
	parts, remove          list
	sign, attr, extraAttr  list
	note                   list
	asJSON                 bool
	packing

	m     bundle.Manifest
	files map[string]bundle.File
	kept  map[string]*bundle.Stored // parts of the bundle that it is made from, as long as nothing changes them
	given map[string]bool           // parts that -part has named a file for
	attrs map[string]json.RawMessage
	open  []io.Closer
}

func create(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var c creation
	var m bundle.Manifest
	fs.StringVar(&c.out, "o", "", "bundle to be written, - for the standard output: `file`")
	fs.StringVar(&c.from, "from", "", "start from this `bundle`")
	fs.StringVar(&c.dir, "dir", "", "start from this `directory`")
	fs.StringVar(&c.prefix, "prefix", "", "leading directory of the names, as in bundles of mos build: `name`")
	fs.Var(&c.parts, "part", "add or change a part: `NAME=FILE[,PROPERTY=VALUE...]`")
	fs.Var(&c.remove, "remove", "leave out the part `name`")
	fs.Var(&c.sign, "sign", "sign with this private key: `[INDEX=]FILE`")
	fs.Var(&c.note, "note", "sign with this Ed25519 private key, as of ota keygen -type note: `FILE`")
	fs.Var(&c.attr, "attr", "member of the manifest: `NAME=VALUE`")
	fs.Var(&c.extraAttr, "extra-attr", "member beside the signatures, which none of them covers: `NAME=VALUE`")
	fs.StringVar(&m.Name, "name", "", "product `name`")
	fs.StringVar(&m.Platform, "platform", "", "`hardware` it is for")
	fs.StringVar(&m.Version, "version", "", "`version` for people")
	fs.StringVar(&m.BuildID, "build-id", "", "`id` that tells builds of a version apart")
	fs.StringVar(&m.Description, "description", "", "`text` for people")
	fs.Uint64Var(&m.Security, "security", 0, "security version: devices refuse what is older than what they have committed: `N`")
	fs.BoolVar(&c.asJSON, "json", false, "print the result as JSON")
	c.define(fs)
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		defer func() {
			for _, f := range c.open {
				f.Close()
			}
		}()
		err := c.collect(ctx, e, &m)
		if err != nil {
			return err
		}
		return c.write(ctx, e)
	}
}

// collect puts together the manifest and the files.
func (c *creation) collect(ctx context.Context, e *env, m *bundle.Manifest) error {
	c.files, c.was, c.only = map[string]bundle.File{}, map[string]bundle.Packing{}, map[string]bundle.Encoding{}
	c.kept, c.given = map[string]*bundle.Stored{}, map[string]bool{}
	var err error
	switch {
	case c.out == "":
		return usagef("need -o FILE")
	case c.from != "" && c.dir != "":
		return usagef("-from and -dir exclude each other")
	case c.from != "":
		err = c.fromBundle(ctx, e)
	case c.dir != "":
		err = c.fromDir()
	}
	if err != nil {
		return err
	}
	for _, f := range []struct{ to, from *string }{
		{&c.m.Name, &m.Name}, {&c.m.Platform, &m.Platform}, {&c.m.Version, &m.Version},
		{&c.m.BuildID, &m.BuildID}, {&c.m.Description, &m.Description},
	} {
		if *f.from != "" {
			*f.to = *f.from
		}
	}
	if m.Security != 0 {
		c.m.Security = m.Security
	}
	if epoch := e.getenv("SOURCE_DATE_EPOCH"); epoch != "" {
		s, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil || s < 0 || s > 253402300799 { // of the year 9999
			return usagef("SOURCE_DATE_EPOCH: %s: need seconds since 1970", ota.Quote(epoch))
		}
		t := time.Unix(s, 0).UTC()
		c.m.BuildTimestamp = t.Format(time.RFC3339)
		if m.BuildID == "" {
			c.m.BuildID = t.Format("20060102-150405")
		}
	}
	for _, name := range c.remove {
		p := c.m.Part(name)
		if p == nil {
			return usagef("-remove: there is no part %s", ota.Quote(name))
		}
		delete(c.files, p.Src)
		c.m.Parts = slices.DeleteFunc(c.m.Parts, func(p bundle.Part) bool { return p.Name == name })
	}
	for _, spec := range c.parts {
		if err := c.part(spec); err != nil {
			return err
		}
	}
	if err := attributes(c.attr, &c.m.Extra); err != nil {
		return err
	}
	if err := attributes(c.extraAttr, &c.attrs); err != nil {
		return err
	}
	switch {
	case len(c.m.Parts) == 0:
		return usagef("no parts: need -part, -dir or -from")
	case c.m.Platform == "" || c.m.Version == "":
		return usagef("need -platform and -version")
	}
	return c.pack(&c.m, c.kept)
}

func (c *creation) fromBundle(ctx context.Context, e *env) error {
	a, err := openArchive(ctx, c.from)
	if err != nil {
		return err
	}
	c.open = append(c.open, a)
	c.m = *a.r.Manifest()
	c.m.Parts = slices.Clone(c.m.Parts)
	extra := map[string]json.RawMessage{}
	for k, v := range c.m.Extra {
		extra[k] = v
	}
	c.m.Extra, c.attrs = extra, a.r.Attrs()
	if c.prefix == "" {
		c.prefix = strings.TrimSuffix(a.dir(), "/")
	}
	if a.signed() && len(c.sign)+len(c.note) == 0 {
		e.notef("the manifest is written anew, so the signatures of %s are left out", c.from)
	}
	for i := range c.m.Parts {
		p := &c.m.Parts[i]
		c.was[p.Name] = a.packing(p)
		s, err := a.r.Stored(a.f, p.Name)
		if err == nil && (p.SHA1 != nil || c.was[p.Name].Encoding == bundle.EncodingZstd) { // else digests are added
			c.kept[p.Name] = s
		}
	}
	c.dropIndex()
	c.files, err = a.files()
	return err
}

// dropIndex leaves out the part that is made anew.
func (c *creation) dropIndex() {
	if name := c.m.Index; name != "" {
		c.m.Parts = slices.DeleteFunc(c.m.Parts, func(p bundle.Part) bool { return p.Name == name })
		c.m.Index = ""
	}
}

func (c *creation) fromDir() error {
	b, err := os.ReadFile(filepath.Join(c.dir, bundle.ManifestName))
	if err == nil {
		m, err := bundle.ParseManifest(b)
		if err != nil {
			return fmt.Errorf("%s: %w", c.dir, err)
		}
		c.m = *m
		c.dropIndex()
		for _, p := range c.m.Parts {
			if p.Src == "" {
				continue
			}
			c.was[p.Name] = p.Packing()
			if c.files[p.Src], err = c.file(filepath.Join(c.dir, p.Src)); err != nil {
				return err
			}
		}
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, d := range entries {
		if strings.HasPrefix(d.Name(), ".") {
			continue
		}
		name, _, _ := strings.Cut(d.Name(), ".")
		if c.m.Part(name) != nil {
			return usagef("%s: two files for a part %s; say which one with a manifest.json, or with -part", c.dir, ota.Quote(name))
		}
		if c.files[d.Name()], err = c.file(filepath.Join(c.dir, d.Name())); err != nil {
			return err
		}
		c.m.Parts = append(c.m.Parts, bundle.Part{Name: name, Src: d.Name()})
	}
	return nil
}

// file opens a file that stays open until the bundle is written.
func (c *creation) file(name string) (bundle.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	c.open = append(c.open, f)
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: not a regular file: %w", name, ota.ErrInvalid)
	}
	if out, err := os.Stat(c.out); err == nil && os.SameFile(info, out) {
		return nil, usagef("%s: the bundle is made from it, so -o must be another file", name)
	}
	return io.NewSectionReader(f, 0, info.Size()), nil
}

// part adds a part, or changes one: NAME[=FILE][,PROPERTY=VALUE...].
func (c *creation) part(spec string) error {
	fields := strings.Split(spec, ",")
	name, file, hasFile := strings.Cut(fields[0], "=")
	bad := func(format string, args ...any) error {
		return usagef("part %s: "+format, append([]any{ota.Quote(name)}, args...)...)
	}
	p := c.m.Part(name)
	if p == nil {
		if !hasFile {
			return bad("there is none to be changed; NAME=FILE adds one")
		}
		c.m.Parts = append(c.m.Parts, bundle.Part{Name: name})
		p = &c.m.Parts[len(c.m.Parts)-1]
	}
	old := *p
	if file != "" {
		p.Src, p.Fill = filepath.Base(file), nil
	}
	extra := map[string]json.RawMessage{}
	for k, v := range p.Extra {
		extra[k] = v
	}
	p.Extra = extra
	for _, f := range fields[1:] {
		k, v, ok := strings.Cut(f, "=")
		var err error
		switch {
		case !ok || k == "":
			return bad("%s: need PROPERTY=VALUE", ota.Quote(f))
		case k == "type":
			p.Type = v
		case k == "src":
			p.Src = v
		case k == "size":
			p.Size, err = parseSize(v)
		case k == "fill":
			var n uint64
			n, err = strconv.ParseUint(v, 0, 8)
			b := byte(n)
			p.Fill = &b
		case k == "update":
			var update bool
			update, err = strconv.ParseBool(v)
			p.NoUpdate = !update
		case k == "compress":
			c.only[name], err = parseEncoding(v)
		case strings.HasPrefix(k, "cs_"):
			return bad("digests are computed")
		case v == "":
			delete(p.Extra, k)
		default:
			p.Extra[k] = jsonValue(v)
		}
		if err != nil {
			return bad("%s: %w", k, err)
		}
	}
	if p.Fill != nil && file == "" && hasFile {
		p.Src = ""
	}
	switch {
	case file != "" && c.given[name]:
		return bad("two files")
	case file != "":
		c.given[name] = true
		delete(c.kept, name)
		delete(c.files, old.Src)
		if c.files[p.Src] != nil {
			return bad("another part has a file %s; give this one another name with src=", ota.Quote(p.Src))
		}
		f, err := c.file(file)
		if err != nil {
			return err
		}
		c.files[p.Src] = f
	case p.Src != old.Src:
		f := c.files[old.Src]
		delete(c.files, old.Src)
		if p.Src != "" && f != nil {
			c.files[p.Src] = f
		}
	}
	if p.Src == "" && p.Fill == nil {
		return bad("need a file, or size and fill")
	}
	return nil
}

func (c *creation) write(ctx context.Context, e *env) error {
	keys, err := signers(c.out, c.sign, nil)
	if err != nil {
		return err
	}
	if err := otherThan(c.out, c.note...); err != nil {
		return err
	}
	noteKeys, err := noteKeys(c.note)
	if err != nil {
		return err
	}
	o := &bundle.WriteOptions{Keys: keys, NoteKeys: noteKeys, Attrs: c.attrs, Dir: c.prefix, Pack: c.how, Workers: c.workers()}
	if c.compressed() {
		f, remove, err := scratch(c.out)
		if err != nil {
			return err
		}
		defer remove()
		o.Scratch = f
	}
	// Everything is read twice, but what is compressed.
	bar := e.bar("create")
	defer bar.end()
	var done, total int64
	for _, p := range c.m.Parts {
		name, f := p.Src, c.files[p.Src]
		if f == nil {
			continue
		}
		if s := c.kept[p.Name]; s != nil {
			c.files[name] = s
			continue
		}
		if total += f.Size(); c.how[p.Name].Encoding == bundle.EncodingNone {
			total += f.Size()
		}
		c.files[name] = counted{f, func(n int) {
			done += int64(n)
			bar.show(done, total)
		}}
	}
	sum := sha256.New()
	var size int64
	err = e.writeFile(c.out, func(w io.Writer) error {
		n := counter{w: io.MultiWriter(w, sum)}
		err := bundle.Write(ctx, &n, &c.m, c.files, o)
		size = n.n
		return err
	})
	bar.end()
	if err != nil {
		var bad *bundle.Error
		if errors.As(err, &bad) { // not a bundle that fails to verify, but input that makes none
			return fail(exitFailed, "", "%w", err)
		}
		return err
	}
	res := struct {
		File   string `json:"file"`
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	}{c.out, size, hex.EncodeToString(sum.Sum(nil))}
	switch {
	case c.out == "-":
	case c.asJSON:
		return e.printJSON(res)
	default:
		e.printf("%s  %d bytes  sha256 %s\n", res.File, res.Size, res.SHA256)
	}
	if len(c.sign)+len(c.note) == 0 {
		e.notef("hint: it is not signed; ota sign -key KEY does that")
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func sign(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var keys list
	var note noteFlags
	fs.Var(&keys, "key", "P-256 private key: `[INDEX=]FILE`")
	note.define(fs)
	out := fs.String("o", "", "write this `file` in place of changing the bundle")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		if len(keys) == 0 && !note.any() && !note.text {
			return usagef("need -key FILE, -note FILE, -attach FILE, -remove NAME or -text")
		}
		if err := otherThan(*out, note.files()...); err != nil {
			return err
		}
		a, err := openArchive(ctx, args[0])
		if err != nil {
			return err
		}
		defer a.Close()
		text := trust.ManifestText(a.r.Manifest().Raw())
		if note.text {
			e.printf("%s", text)
			return nil
		}
		o := &bundle.ResignOptions{Remove: note.remove}
		taken := func(i int) bool { return a.sigs[i] != nil && !slices.Contains(note.remove, "sig"+strconv.Itoa(i)) }
		if o.Keys, err = signers(*out, keys, taken); err != nil {
			return err
		}
		if o.NoteKeys, err = noteKeys(note.keys); err != nil {
			return err
		}
		if o.NoteLines, err = note.lines(text); err != nil {
			return err
		}
		if *out == "" {
			*out = args[0]
		}
		err = e.writeFile(*out, func(w io.Writer) error {
			return bundle.Resign(ctx, w, io.NewSectionReader(a.f, 0, a.size), o)
		})
		switch {
		case errors.Is(err, bundle.ErrHeaderTooLong):
			return fail(exitFailed, "there is room for three; -remove NAME removes one", "too many signatures: %w", err)
		case errors.Is(err, ota.ErrInvalid) && !errors.Is(err, bundle.ErrPolicy):
			return fail(exitFailed, "ota inspect tells who has signed", "%w", err)
		}
		if err != nil || *out == "-" {
			return err
		}
		for i, k := range o.Keys {
			if k == nil {
				continue
			}
			id, err := bundle.KeyID(k.Public().(*ecdsa.PublicKey)) // Resign has accepted it
			if err != nil {
				return err
			}
			e.printf("%s  sig%d by %s\n", *out, i, id[:16])
		}
		for _, k := range o.NoteKeys {
			e.printf("%s  note by %s\n", *out, k.Key().ID())
		}
		for _, s := range o.NoteLines {
			e.printf("%s  note by %s\n", *out, s.ID())
		}
		return nil
	}
}

// inspection is what ota inspect tells.
type inspection struct {
	File        string            `json:"file"`
	Size        int64             `json:"size"`
	Name        string            `json:"name"`
	Platform    string            `json:"platform"`
	Version     string            `json:"version"`
	BuildID     string            `json:"build_id"`
	Timestamp   string            `json:"build_timestamp,omitempty"`
	Description string            `json:"description,omitempty"`
	Security    uint64            `json:"security"`
	Parts       []inspectedPart   `json:"parts"`
	Signatures  []signature       `json:"signatures"`
	NoteText    string            `json:"note_text,omitempty"` // that the signatures of the note are about
	Note        []noteSignature   `json:"note,omitempty"`
	Mongoose    map[string]string `json:"mongoose"`
	Error       string            `json:"error,omitempty"`
}

type inspectedPart struct {
	Name   string  `json:"name"`
	Type   string  `json:"type,omitempty"`
	File   string  `json:"file,omitempty"`
	Size   int64   `json:"size"`
	Stored int64   `json:"stored"`
	Ratio  float64 `json:"ratio"`              // Stored / Size
	Coding string  `json:"encoding,omitempty"` // deflate or zstd
	Frame  int64   `json:"frame,omitempty"`
	Window int64   `json:"window,omitempty"`
	Chunk  int64   `json:"chunk,omitempty"`
	SHA256 string  `json:"sha256,omitempty"`
	SHA1   string  `json:"sha1,omitempty"`
	Fill   *byte   `json:"fill,omitempty"`
	Update bool    `json:"update"`
}

type signature struct {
	Index   int    `json:"index"`
	Key     string `json:"key,omitempty"` // id, if it is by one of the keys given
	KeyFile string `json:"key_file,omitempty"`
	DER     []byte `json:"der"` // for other tools: of the SHA-256 of the manifest
}

// noteSignature is a signature of the note.
type noteSignature struct {
	Key   string `json:"key"` // id
	State string `json:"state"`
	Sig   []byte `json:"sig"` // for other tools: of note_text
}

// inspectNote tells about the note, given those who are trusted, or nil.
func (a *archive) inspectNote(t *trust.Anchor) (text string, sigs []noteSignature) {
	if a.note == nil {
		return "", nil
	}
	var keys []trust.Key
	if t != nil {
		keys = t.Record().Release.Keys
	}
	stale := a.note.Text != trust.ManifestText(a.r.Manifest().Raw())
	for _, s := range a.note.Signatures {
		alone := trust.Note{Text: a.note.Text, Signatures: []trust.Signature{s}}
		by, err := alone.SignedBy(keys)
		state := "unknown"
		switch {
		case stale:
			state = "stale"
		case err != nil:
			state = "wrong"
		case len(by) > 0:
			state = "valid"
		}
		sigs = append(sigs, noteSignature{s.ID(), state, s.Sig})
	}
	return a.note.Text, sigs
}

func (e *env) printNote(sigs []noteSignature) {
	for _, s := range sigs {
		says := map[string]string{
			"valid":   e.paint(32, "valid") + " by " + s.Key,
			"wrong":   e.paint(31, "wrong") + ", names " + s.Key,
			"stale":   e.paint(31, "stale") + ": about another manifest, by " + s.Key,
			"unknown": e.paint(33, "by a key that is not trusted (-trust)") + ", " + s.Key,
		}
		e.printf("note      %s\n", says[s.State])
	}
}

func inspect(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var keys list
	fs.Var(&keys, "key", "public key, to tell which signatures are by it: `FILE`")
	trusted := fs.String("trust", "", "trust record, to tell which signatures of the note are by its keys: `FILE`")
	asJSON := fs.Bool("json", false, "print JSON")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		public, names, err := verifiers(keys)
		if err != nil {
			return err
		}
		var anchor *trust.Anchor
		if *trusted != "" {
			if anchor, err = openTrust(*trusted); err != nil {
				return err
			}
		}
		a, err := openArchive(ctx, args[0])
		var bad *bundle.Error
		if errors.As(err, &bad) {
			in := inspection{File: args[0], Error: bad.Error(), Mongoose: refusals(bad)}
			if compressed(args[0]) {
				in.Mongoose = refuseCompressed()
			}
			if *asJSON {
				return errors.Join(e.printJSON(in), err)
			}
			e.printMongoose(in.Mongoose)
		}
		if err != nil {
			return err
		}
		defer a.Close()
		in := a.inspect()
		in.File = args[0]
		sum := sha256.Sum256(a.r.Manifest().Raw())
		for i, der := range a.sigs {
			if der == nil {
				continue
			}
			s := signature{Index: i, DER: der}
			for j, k := range public {
				if k != nil && ecdsa.VerifyASN1(k, sum[:], der) {
					id, err := bundle.KeyID(k)
					if err != nil {
						return err
					}
					s.Key, s.KeyFile = id, names[j]
				}
			}
			in.Signatures = append(in.Signatures, s)
		}
		in.NoteText, in.Note = a.inspectNote(anchor)
		if *asJSON {
			return e.printJSON(in)
		}
		e.printInspection(in)
		return nil
	}
}

func (a *archive) inspect() *inspection {
	m := a.r.Manifest()
	in := &inspection{Size: a.size, Name: m.Name, Platform: m.Platform, Version: m.Version, BuildID: m.BuildID,
		Timestamp: m.BuildTimestamp, Description: m.Description, Security: m.Security,
		Signatures: []signature{}, Mongoose: a.mongoose()}
	for _, p := range m.Parts {
		q := inspectedPart{Name: p.Name, Type: p.Type, File: p.Src, Size: p.Size, Fill: p.Fill, Update: !p.NoUpdate}
		if z := a.entry(&p); z != nil {
			k := a.packing(&p)
			q.Stored, q.Coding, q.Frame, q.Window, q.Chunk = int64(z.CompressedSize64), string(k.Encoding), k.Frame, k.Window, max(k.Chunk, 0)
		}
		if p.Size > 0 {
			q.Ratio = float64(q.Stored) / float64(p.Size)
		}
		if p.SHA256 != nil {
			q.SHA256 = hex.EncodeToString(p.SHA256[:])
		}
		if p.SHA1 != nil {
			q.SHA1 = hex.EncodeToString(p.SHA1[:])
		}
		in.Parts = append(in.Parts, q)
	}
	return in
}

// mongoose tells what devices with Mongoose OS say to an intact bundle: the checks
// of their update engine (mongoose-os-libs/ota-common, src/mgos_updater_common.c,
// and the prebuilt libraries of later versions).
func (a *archive) mongoose() map[string]string {
	if first := a.zip.File[0]; first.Method != zip.Store && first.CompressedSize64 != first.UncompressedSize64 {
		return refuseCompressed()
	}
	m := a.r.Manifest()
	old := "installs it on " + ota.Quote(m.Platform) + "; checks CRC-32 and SHA-1, no signatures"
	switch {
	case m.Platform == "", m.Version == "", m.BuildID == "":
		old = "refuses it: Required manifest field missing (platform, version and build_id)"
	case slices.ContainsFunc(m.Parts, func(p bundle.Part) bool { return p.Src != "" && p.SHA1 == nil }):
		old = "installs it on " + ota.Quote(m.Platform) + "; checks CRC-32 only where there is no cs_sha1"
	}
	for _, z := range a.zip.File {
		if z.Flags&8 != 0 { // data descriptors
			old = "refuses it: Malformed archive"
		}
	}
	g3 := "installs it; checks CRC-32 and digests"
	n := 0
	for _, s := range a.sigs {
		if s != nil {
			n++
		}
	}
	switch {
	case !slices.ContainsFunc(m.Parts, func(p bundle.Part) bool { return !p.NoUpdate }):
		g3 = "refuses it: -10 Nothing interesting in the update (wrong platform?)"
	case n == 0:
		g3 += "; refuses it if it requires signatures (update.sig_req_mask)"
	default:
		g3 += "; and signatures, if it has keys of the same index (update.key0 ...)"
	}
	for i := range m.Parts {
		if a.packing(&m.Parts[i]).Encoding != bundle.EncodingNone { // by another tool, which left the manifest as it is
			old, g3 = "refuses it, or installs garbage", "refuses it, or installs garbage"
		}
	}
	return map[string]string{"G1": old, "G2": old, "G3": g3}
}

// refuseCompressed tells what they say to a compressed manifest, whose header is the
// first thing that they read.
func refuseCompressed() map[string]string {
	const old, g3 = "refuses it at once: Cannot handle compressed .zip", "refuses it at once: -1 Compressed ZIP files are not supported"
	return map[string]string{"G1": old, "G2": old, "G3": g3}
}

// compressed says whether the first entry of an archive that cannot be opened is.
func compressed(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	b := make([]byte, 10)
	_, err = io.ReadFull(f, b)
	return err == nil && string(b[:4]) == "PK\x03\x04" && b[8] != byte(zip.Store)
}

// refusals tells what they say to a bundle that this library refuses.
func refusals(bad *bundle.Error) map[string]string {
	code, text := bad.MongooseCode()
	old := "refuses it, or installs garbage"
	if errors.Is(bad, bundle.ErrCompressed) {
		old = "refuses it: Cannot handle compressed .zip"
	}
	g3 := fmt.Sprintf("refuses it: %d %s", code, text)
	if text == bad.Error() {
		g3 = "may install it: it does not check this"
	}
	return map[string]string{"G1": old, "G2": old, "G3": g3}
}

func (e *env) printMongoose(says map[string]string) {
	for _, g := range []struct{ name, years string }{{"G1", "2016-17"}, {"G2", "2018-19"}, {"G3", "since 2020"}} {
		e.printf("Mongoose OS %s, %s: %s\n", g.name, g.years, says[g.name])
	}
}

func (e *env) printInspection(in *inspection) {
	for _, v := range []struct{ label, value string }{
		{"name", in.Name}, {"platform", in.Platform}, {"version", in.Version}, {"build id", in.BuildID},
		{"built", in.Timestamp}, {"about", in.Description}, {"security", strconv.FormatUint(in.Security, 10)},
		{"size", strconv.FormatInt(in.Size, 10) + " bytes"},
	} {
		if v.value != "" {
			e.printf("%-9s %s\n", v.label, plain(v.value))
		}
	}
	e.printf("\n")
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	packed := slices.ContainsFunc(in.Parts, func(p inspectedPart) bool { return p.Coding != "" || p.Chunk != 0 })
	how := func(cells ...string) string { // only if there is anything to say
		if !packed {
			return ""
		}
		return strings.Join(cells, "\t") + "\t"
	}
	fmt.Fprintf(w, "PART\tTYPE\tFILE\tSIZE\t%sRATIO\t%sDIGEST\n", how("STORED"), how("ENCODING", "FRAME", "WINDOW", "CHUNK"))
	size := func(n int64) string {
		if n == 0 {
			return "-"
		}
		return sizeText(n)
	}
	for _, p := range in.Parts {
		file, ratio, digest, stored, coding := p.File, fmt.Sprintf("%.2f", p.Ratio), "", strconv.FormatInt(p.Stored, 10), p.Coding
		if p.Fill != nil {
			file, ratio, stored = fmt.Sprintf("(all 0x%02x)", *p.Fill), "-", "-"
		}
		if coding == "" {
			coding = "-"
		}
		switch {
		case p.SHA256 != "":
			digest = "sha256 " + p.SHA256
		case p.SHA1 != "":
			digest = "sha1 " + p.SHA1
		}
		if !p.Update {
			digest += " (not for updates)"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s%s\t%s%s\n", p.Name, plain(p.Type), file, p.Size,
			how(stored), ratio, how(coding, size(p.Frame), size(p.Window), size(p.Chunk)), digest)
	}
	w.Flush()
	e.printf("\n")
	for _, s := range in.Signatures {
		switch {
		case s.Key != "":
			e.printf("sig%d      %s by %.16s (%s)\n", s.Index, e.paint(32, "valid"), s.Key, s.KeyFile)
		default:
			e.printf("sig%d      %s\n", s.Index, e.paint(33, "by a key that was not given (-key)"))
		}
	}
	e.printNote(in.Note)
	if len(in.Signatures)+len(in.Note) == 0 {
		e.printf("%s\n", e.paint(33, "not signed"))
	}
	e.printMongoose(in.Mongoose)
}

// plain returns s for a terminal: as it is if it has printable ASCII only, else
// quoted.
func plain(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return ota.Quote(s)
	}
	return s
}

func verify(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var p policyFlags
	p.define(fs)
	platform := fs.String("platform", "", "`hardware` that it must be for")
	name := fs.String("name", "", "`product` that it must be")
	security := fs.Uint64("min-security", 0, "lowest acceptable security version: `N`")
	asJSON := fs.Bool("json", false, "print one JSON object per line")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1000); err != nil {
			return err
		}
		policy, err := p.policy()
		if err != nil {
			return err
		}
		var first error
		for _, file := range args {
			v, err := verifyFile(ctx, e, policy, file, *platform, *name, *security)
			if v == nil {
				return err
			}
			if *asJSON {
				line, _ := json.Marshal(v) // strings only
				e.printf("%s\n", line)
			} else {
				colour := 31
				if v.OK {
					colour = 32
				}
				e.printf("%s: %s %s\n", plain(file), e.paint(colour, v.Result), v.Detail)
			}
			if first == nil {
				first = err
			}
		}
		return first
	}
}

// verdict is what ota verify says about a file.
type verdict struct {
	File     string   `json:"file"`
	OK       bool     `json:"ok"`
	Result   string   `json:"result"`
	Detail   string   `json:"detail,omitempty"`
	SignedBy []string `json:"signed_by,omitempty"`
}

// verifyFile verifies one file. There is no verdict if it cannot be read.
func verifyFile(ctx context.Context, e *env, policy *bundle.Policy, file, platform, name string, security uint64) (*verdict, error) {
	in := e.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	v := &verdict{File: file}
	no := func(code int, result string, err error) (*verdict, error) {
		v.Result, v.Detail = result, err.Error()
		// What there is to say is on the standard output.
		return v, &failure{code: code, err: errors.New("")}
	}
	r, err := policy.Verify(ctx, in)
	if err != nil {
		var pe *os.PathError
		switch {
		case errors.Is(err, bundle.ErrPolicy), errors.As(err, &pe), ctx.Err() != nil:
			return nil, err
		case errors.Is(err, ota.ErrRollback):
			return no(exitTooOld, "too-old", err)
		case errors.Is(err, trust.ErrExpired):
			return no(exitExpired, "expired", err)
		case errors.Is(err, trust.ErrUnknownKey):
			return no(exitWrongKey, "wrong-key", err)
		case errors.Is(err, bundle.ErrUnsigned), errors.Is(err, bundle.ErrNoDigest):
			return no(exitUnsigned, "unsigned", err)
		case errors.Is(err, bundle.ErrSignature):
			return no(exitWrongKey, "wrong-key", err)
		}
		return no(exitDamaged, "damaged", err)
	}
	info := r.Info()
	v.SignedBy = info.SignedBy
	switch {
	case platform != "" && info.Platform != platform:
		return no(exitWrongPlatform, "wrong-platform", fmt.Errorf("for %s", ota.Quote(info.Platform)))
	case name != "" && info.Name != name:
		return no(exitWrongPlatform, "wrong-product", fmt.Errorf("is %s", ota.Quote(info.Name)))
	case info.Security < security:
		return no(exitTooOld, "too-old", fmt.Errorf("security version %d, need %d", info.Security, security))
	}
	v.OK, v.Result, v.Detail = true, "ok", "signed by "+strings.Join(info.SignedBy, ", ")
	if info.Unsigned {
		v.Detail = "not signed"
	}
	return v, nil
}

func extract(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	dir := fs.String("C", ".", "`directory` to write to; it is made if there is none")
	force := fs.Bool("f", false, "overwrite files")
	stdout := fs.Bool("stdout", false, "write to the standard output")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1000); err != nil {
			return err
		}
		a, err := openArchive(ctx, args[0])
		if err != nil {
			return err
		}
		defer a.Close()
		files, err := a.files()
		if err != nil {
			return err
		}
		raw := a.r.Manifest().Raw()
		files[bundle.ManifestName] = io.NewSectionReader(strings.NewReader(string(raw)), 0, int64(len(raw)))
		var names []string
		for _, part := range args[1:] {
			p := a.r.Manifest().Part(part)
			switch {
			case part == bundle.ManifestName:
				names = append(names, part)
			case p == nil || files[p.Src] == nil:
				return fail(exitFailed, "ota inspect lists the parts", "%s has no file for a part %s", args[0], ota.Quote(part))
			default:
				names = append(names, p.Src)
			}
		}
		if len(names) == 0 {
			for name := range files {
				names = append(names, name)
			}
			slices.Sort(names)
		}
		if *stdout {
			for _, name := range names {
				if _, err := io.Copy(e.stdout, io.NewSectionReader(files[name], 0, files[name].Size())); err != nil {
					return err
				}
			}
			return nil
		}
		if err := os.MkdirAll(*dir, 0o777); err != nil {
			return err
		}
		for _, name := range names {
			path := filepath.Join(*dir, name) // names are plain
			if _, err := os.Lstat(path); err == nil && !*force {
				return fail(exitFailed, "-f overwrites", "%s exists", path)
			}
		}
		for _, name := range names {
			path := filepath.Join(*dir, name)
			err := e.writeFile(path, func(w io.Writer) error {
				_, err := io.Copy(w, io.NewSectionReader(files[name], 0, files[name].Size()))
				return err
			})
			if err != nil {
				return err
			}
			e.printf("%s\n", path)
		}
		return nil
	}
}
