package main

import (
	"flag"
	"runtime"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
)

// packing is what ota create has been told about compression.
type packing struct {
	compress, profile    string
	level                int
	frame, window, chunk sizeFlag

	was  map[string]bundle.Packing  // how the source stores its parts
	only map[string]bundle.Encoding // what was said about one part
	how  map[string]bundle.Packing  // what it comes to
}

// profiles are the settings of zstd by name.
var profiles = map[string]bundle.Packing{
	"mcu":   {Frame: 64 << 10, Window: 64 << 10, Chunk: 4 << 10},
	"dense": {Frame: 4 << 20, Window: 4 << 20, Chunk: 64 << 10, Level: 19},
}

func (k *packing) define(fs *flag.FlagSet) {
	fs.StringVar(&k.compress, "compress", "", "`encoding` that all parts are stored in: none, deflate or zstd; else that of the bundle or directory it is made from, and none for new parts")
	fs.StringVar(&k.profile, "profile", "", "settings for zstd by `name`: mcu (frames of 64 KiB, chunks of 4 KiB), or dense (frames of 4 MiB, chunks of 64 KiB, level 19); else frames of 64 KiB, and chunks that grow with the part")
	fs.IntVar(&k.level, "level", 0, "level `N` of compression: 1 to 22 for zstd, else 7; 1 to 9 for deflate, else 9. Bundles do not tell the one they were made with")
	fs.Var(&k.frame, "frame", "`size` of what each zstd frame decodes to; more is denser, and takes more memory to decode")
	fs.Var(&k.window, "window", "`size` of the window inside of a zstd frame, a power of two")
	fs.Var(&k.chunk, "chunk", "`size` of the pieces with digests, of which devices fetch only those they need; 0 for none; else only zstd has them")
}

func parseEncoding(s string) (bundle.Encoding, error) {
	switch s {
	case "none":
		return bundle.EncodingNone, nil
	case string(bundle.EncodingDeflate), string(bundle.EncodingZstd):
		return bundle.Encoding(s), nil
	}
	return "", usagef("%s: need none, deflate or zstd", ota.Quote(s))
}

// pack decides how the parts of m are stored, and removes those from kept that are to
// be stored in another way than they are.
func (k *packing) pack(m *bundle.Manifest, kept map[string]*bundle.Stored) error {
	all, given := bundle.EncodingNone, k.compress != ""
	if given {
		var err error
		if all, err = parseEncoding(k.compress); err != nil {
			return usagef("-compress: %w", err)
		}
	}
	preset, ok := profiles[k.profile]
	if k.profile != "" && !ok {
		return usagef("-profile %s: need mcu or dense", ota.Quote(k.profile))
	}
	k.how = map[string]bundle.Packing{}
	used := map[bundle.Encoding]bool{}
	for _, p := range m.Parts {
		if p.Src == "" {
			continue
		}
		h := k.was[p.Name]
		e := h.Encoding
		if given {
			e = all
		}
		if one, ok := k.only[p.Name]; ok {
			e = one
		}
		if e != h.Encoding {
			h = bundle.Packing{Encoding: e}
		}
		used[e] = true
		if e == bundle.EncodingZstd {
			if k.profile != "" {
				h = preset
				h.Encoding = e
			}
			if k.frame.n != nil { // the others follow from it
				h.Frame, h.Window, h.Chunk = *k.frame.n, 0, min(h.Chunk, *k.frame.n)
			}
			h.Window = k.window.or(h.Window)
		}
		if e != bundle.EncodingNone && k.level != 0 {
			h.Level = k.level
		}
		if k.chunk.n != nil {
			if h.Chunk = *k.chunk.n; h.Chunk == 0 {
				h.Chunk = -1
			}
		}
		if kept[p.Name] != nil && h == k.was[p.Name] {
			continue
		}
		delete(kept, p.Name)
		if h != (bundle.Packing{}) {
			k.how[p.Name] = h
		}
	}
	switch {
	case !used[bundle.EncodingZstd] && (k.profile != "" || k.frame.n != nil || k.window.n != nil):
		return usagef("-profile, -frame and -window are for parts that are stored as zstd; there is none")
	case !used[bundle.EncodingZstd] && !used[bundle.EncodingDeflate] && k.level != 0:
		return usagef("-level is for parts that are compressed; there is none")
	case k.level < 0 || k.level > 22 || k.level > 9 && used[bundle.EncodingDeflate]:
		return usagef("-level: need 1 to 22 for zstd, 1 to 9 for deflate")
	}
	return nil
}

// compressed says whether any part is.
func (k *packing) compressed() bool {
	for _, h := range k.how {
		if h.Encoding != bundle.EncodingNone {
			return true
		}
	}
	return false
}

// workers returns how many frames are encoded at a time, so that it takes less than
// about 100 MiB.
func (k *packing) workers() int {
	n := min(runtime.GOMAXPROCS(0), 8)
	for _, h := range k.how {
		if h.Encoding != bundle.EncodingZstd {
			continue
		}
		frame := h.Frame
		if frame == 0 {
			frame = bundle.DefaultFrame
		}
		each := int64(4 << 20) // of an encoder
		if h.Level >= 10 {
			each = 40 << 20
		} else if h.Level >= 6 {
			each = 10 << 20
		}
		n = min(n, int(max(1, 100<<20/(each+2*frame))))
	}
	return n
}
