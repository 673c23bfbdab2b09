/*
 * The update protocol of this library: two slots, a boot record in NCOPY
 * copies, the boot stage and the updater in the running firmware.
 *
 * One process of guarded commands. A step is the smallest thing that a power
 * cut can tell apart: each copy of the record and each slot is first spoiled,
 * then complete. A cut is possible between any two steps, without bound, and so
 * are updates, commits, reverts, snapshots and boot states set by hand. A copy
 * is a packed BootState with its generation, as boot/bootrecord keeps them.
 *
 * The assertions are named in README.md.
 */

/* ---------- size of the world ---------- */
#ifndef NCOPY
#define NCOPY 2         /* copies of the record, 1 to 4 */
#endif
#ifndef NTRY
#define NTRY 1          /* boots of an uncommitted firmware, 1 to 3 */
#endif
#ifndef FLIPS
#define FLIPS 0         /* copies that spoil by themselves, in the whole run */
#endif
#ifndef WEAK
#define WEAK 0          /* copies that may read either way at one time: a cut
                           left them so. 0: what a cut left never reads well */
#endif
#ifndef ROT
#define ROT 0           /* slots that spoil by themselves, in the whole run */
#endif
#ifndef LOST
#define LOST 0          /* 1: all copies may go at once, one time */
#endif
#ifndef WITH_SNAP
#define WITH_SNAP 1     /* CreateSnapshot */
#endif
#ifndef WITH_SET
#define WITH_SET 1      /* SetBootState */
#endif
#ifndef WITH_KILL
#define WITH_KILL 1     /* the process dies and is started again, no reboot */
#endif
#ifndef FIRST
#define FIRST 0         /* 1: no boot state was ever stored */
#endif

/* ---------- the rules; 0 breaks one ---------- */
#ifndef R_MIRROR
#define R_MIRROR 1      /* a store writes every copy, not only the oldest */
#endif
#ifndef R_NEWESTLAST
#define R_NEWESTLAST 1  /* the newest copy is overwritten last */
#endif
#ifndef R_DAMAGEDFIRST
#define R_DAMAGEDFIRST 1 /* damaged copies are overwritten first */
#endif
#ifndef R_HEAL
#define R_HEAL 1        /* all copies are made equal before one is acted on */
#endif
#ifndef R_HEALGEN
#define R_HEALGEN 1     /* beside a damaged copy the generation skips one */
#endif
#ifndef R_FIRST
#define R_FIRST 1       /* one spoiled copy beside blank ones: nothing stored */
#endif
#ifndef R_ACKLATE
#define R_ACKLATE 1     /* Commit answers when every copy is written */
#endif
#ifndef R_COUNTFIRST
#define R_COUNTFIRST 1  /* a try is used up before the firmware runs */
#endif
#ifndef R_VERIFYBOOT
#define R_VERIFYBOOT 1  /* the boot stage verifies the slot */
#endif
#ifndef R_VERIFYFIRST
#define R_VERIFYFIRST 1 /* a slot is read back before it is selected */
#endif
#ifndef R_FORGET
#define R_FORGET 1      /* the record forgets a slot before it is erased. 2: not
                           if nothing is stored yet */
#endif
#ifndef R_FALLBACK
#define R_FALLBACK 1    /* 0: none; 2: also to firmware never committed */
#endif
#ifndef R_LOCK
#define R_LOCK 1        /* one operation at a time. 0: no lock; 2: Commit, Revert
                           and the timer look at the state outside of it */
#endif
#ifndef R_FLOOR
#define R_FLOOR 1       /* the floor rises in the commit's own store. 0: in one
                           before it; 2: in one after it */
#endif
#ifndef R_GUARD
#define R_GUARD 1       /* no slot is written during a trial */
#endif
#ifndef R_SETGUARD
#define R_SETGUARD 1    /* SetBootState verifies; a switch is a trial */
#endif
#ifndef R_REVAPPR
#define R_REVAPPR 1     /* only committed firmware is made a revert slot */
#endif
#ifndef R_CALLOFF
#define R_CALLOFF 1     /* the running firmware's trial, not begun, is called off */
#endif
#ifndef R_TAG
#define R_TAG 2         /* Commit names: 2 its trial, 1 an image, 0 nothing */
#endif
#ifndef R_RUNNING
#define R_RUNNING 1     /* Commit only if the running slot is the active one */
#endif
#ifndef R_AUTH
#define R_AUTH 1        /* unauthenticated images are refused */
#endif

/* ---------- images ---------- */
#define PART 0          /* erased, half written or damaged */
/* 1 factory, 2 newer with a higher security version, 3 older, 4 forged */
#define SEC(v)  ((v)==2 || (v)==4)
#define NONE 2          /* no slot */

/* ---------- a packed BootState ---------- */
#define ACT(c)    ((c)&1)
#define COM(c)    (((c)>>1)&1)
#define REV(c)    (((c)>>2)&3)
#define TRIES(c)  (((c)>>4)&3)
#define BOOTED(c) (((c)>>6)&1)
#define DIG(c,s)  (((c)>>(7+3*(s)))&7)   /* what slot s holds, 0 unknown */
#define APP(c,s)  (((c)>>(13+(s)))&1)
#define REJ(c,s)  (((c)>>(15+(s)))&1)
#define FLOOR(c)  (((c)>>17)&1)
#define LOSTC(c)  (((c)>>18)&1)
#define PUT(c,sh,m,v) (((c)&~((m)<<(sh)))|((v)<<(sh)))
#define MAIN(c,a,com,rev,tries,booted) \
  (((c)&~127)|(a)|((com)<<1)|((rev)<<2)|((tries)<<4)|((booted)<<6))
#define SETSLOT(c,s,d,a,j) \
  PUT(PUT(PUT(c,7+3*(s),7,d),13+(s),1,a),15+(s),1,j)
#define SETREJ(c,s,j)     PUT(c,15+(s),1,j)
#define FORGET(c,s) PUT(SETSLOT(c,s,0,0,0),2,3,(REV(c)==(s)->NONE:REV(c)))
#define MEASURE(c)  (DIG(c,rs)==0 -> SETSLOT(c,rs,slot[rs],1,REJ(c,rs)) : (c))
#define TRIAL(c,a,rev)    SETREJ(MAIN(c,a,0,rev,NTRY,0),a,0)
#define SETTLED(c,a)      (MAIN(c,a,1,NONE,0,0)&~(1<<18))
#define COMMITTED(c)  (PUT(SETREJ(PUT(SETTLED(c,ACT(c)),13+ACT(c),1,1),ACT(c),0),17,1,\
                      (R_FLOOR==1 -> (FLOOR(c)||SEC(DIG(c,ACT(c)))) : FLOOR(c))))
#define LOSTSTATE(a,rev,tries,booted) \
  ((a)|((rev)<<2)|((tries)<<4)|((booted)<<6)|(1<<18))
#define UNBEGUN(c)  (!BOOTED(c) && ACT(c)==rs && !LOSTC(c))
#define REVERTED(c,reject) (LOSTC(c) -> LOSTSTATE(REV(c),ACT(c),1,0) : \
                      SETREJ(SETTLED(c,REV(c)),ACT(c),(REJ(c,ACT(c))||(reject))))

#define ALL      ((1<<NCOPY)-1)
#define BIT(m,i) (((m)>>(i))&1)
#define NSPOILT  ((ok[0]==0)+(NCOPY>1 && ok[1]==0)+(NCOPY>2 && ok[2]==0)+(NCOPY>3 && ok[3]==0))
#define NWEAK    ((ok[0]==2)+(ok[1]==2)+(ok[2]==2)+(ok[3]==2))

/* ---------- non-volatile ---------- */
byte slot[2];
byte ok[4];             /* 0 spoiled, 1 valid, 2 weak, 3 blank */
byte gen[4];            /* less the lowest one: only differences matter */
int  rec[4];
byte flips, rots, losses;

/* ---------- volatile ---------- */
byte mode;              /* 0 boot stage, 1 firmware runs, 2 its updater is up */
bit  rs;                /* running slot */
int  cur;               /* the boot state in memory */
bit  fresh;             /* it is made up, nothing was ever stored */
byte bp;                /* progress of the boot stage, or of Open */
byte kind[2], pc[2];    /* operation of context 0 (calls) and 1 (timer) */
int  nx[2];             /* what it stores */
byte lock;              /* 1 + the context that owns the device */
byte upd; bit t; bit sar;
byte sp;                /* progress of a store or heal */
bit  own; bit heal;     /* its context; it is a heal */
byte w, dn, vm, nw;     /* copy under way, copies done, copies valid, newest */
byte wg, mg;            /* generation being written, highest one known */
byte i;

/* ---------- ghosts: what people were told ---------- */
bit  appr[2];           /* somebody approved what this slot holds */
byte expv = 1;          /* image promised to run when nothing is on trial */
byte pendv;             /* image whose commit is asked for, not answered */
byte tr = NONE; byte trv; byte tb; /* slot on trial, image promised if it fails,
                                      handovers so far */
byte cm; bit stale;     /* a Commit on its way: its image; its trial is over */
bit  lostg; byte bad;   /* the record was lost; handovers to junk in a row */

#define K_UPD 1
#define K_SNAP 2
#define K_SET 3
#define K_COM 4
#define K_REV 5
#define K_TMO 6
#define K_BOOT 7
#define K_OPEN 8

#define FREE_U (R_LOCK==0 || (lock==0 && kind[1]==0))
#define FREE_C (R_LOCK!=1 || lock==0)
#define IDLE   (mode==2 && kind[0]==0)

#ifdef SHOW             /* a trail that can be read, see run */
#define SAY  printf
#define TELL(what) printf(what); printf(": slots %d %d, copies", slot[0], slot[1]); \
  for (i : 0 .. NCOPY-1) { printf(" %d:%d:g%d", ok[i], rec[i], gen[i]) } i=0; printf("\n")
#else
#define SAY(...) skip
#define TELL(what) skip
#endif

#ifdef TRACE            /* random walks that are printed, see traces */
byte op; byte arg; byte hs; byte fuse; byte left = TRACE;
#define STEP atomic
#define GO   (hs<fuse && left>0)
#define CUT  (left>0 && (hs>=fuse || (op==0 && mode==2)))
#define GOODWRITE (arg<10)
#define BADWRITE  (arg>=10)
#define ARG arg
inline dump() {
  printf(" %d %d %d %d", mode, rs, slot[0], slot[1]);
  for (i : 0 .. NCOPY-1) { printf(" %d %d", ok[i]==1, rec[i]) }
  i=0; printf("\n")
}
/* o operation, a argument, r result: 0 cut, 1 done, 2 failed, 3 refused, 4 killed */
inline emit(o,a,r) { printf("T %d %d %d %d", o, a, r, hs); dump(); left--; op=0; arg=0; hs=0; fuse=99 }
inline begin(o,a) {
  op=o; arg=a; hs=0; fuse=99;
  if
  :: skip :: skip
  :: fuse=0; if :: fuse=fuse+1 :: skip fi; if :: fuse=fuse+2 :: skip fi;
     if :: fuse=fuse+4 :: skip fi; if :: fuse=fuse+8 :: skip fi
  fi
}
#define HALF hs++
#else
#define STEP d_step
#define GO   1
#define CUT  1
#define GOODWRITE 1
#define BADWRITE  1
#define ARG 0
#define HALF skip
inline emit(o,a,r) { skip }
inline begin(o,a)  { skip }
#endif

inline spoil(k) { ok[k]=0; gen[k]=0; rec[k]=0 }

/* Generations count from the lowest one on the medium. */
inline normalize() {
  w=255;
  for (i : 0 .. NCOPY-1) { if :: (ok[i]==1||ok[i]==2) && gen[i]<w -> w=gen[i] :: else fi }
  if :: w==255 -> w=0 :: else fi;
  for (i : 0 .. NCOPY-1) { if :: (ok[i]==1||ok[i]==2) -> gen[i]=gen[i]-w :: else fi }
  mg=(mg>w->mg-w:0); wg=(wg>w->wg-w:0); w=0; i=0
}

inline wipe_updater() {
  kind[0]=0; kind[1]=0; pc[0]=0; pc[1]=0; nx[0]=0; nx[1]=0; lock=0;
  upd=0; t=0; sar=0; sp=0; own=0; heal=0; dn=0; vm=0; nw=0; wg=0; mg=0; cur=0; fresh=0; bp=0;
  normalize()
}
inline reset() {
  if :: NWEAK>WEAK && sp>=3 -> spoil(w) :: else fi;
  wipe_updater(); mode=0; rs=0; TELL("off");
  begin(K_BOOT,0)
}
inline done(c) {
  kind[c]=0; pc[c]=0; nx[c]=0; upd=0; t=0; sar=0;
  if :: lock==c+1 -> lock=0 :: else fi
}
/* context c goes on to store nx[c], and then to pc nxt */
inline store(c,nxt) { pc[c]=nxt+100; SAY("operation %d: store %d\n", kind[c], nx[c]) }
inline stored(c)    { sp=0; own=0; pc[c]=pc[c]-100; cur=nx[c]; fresh=0; nx[c]=0 }

inline start_trial(a,rev,c) {
  nx[c]=TRIAL(nx[c],a,rev);
  tr=a; trv=slot[rev]; tb=0; if :: cm!=0 -> stale=1 :: else fi
}
inline revert_answered() {
  if
  :: tr!=NONE -> expv=(tr==rs && tb==0 -> slot[rs] : trv); end_trial()
  :: else
  fi
}
inline end_trial() { pendv=0; tr=NONE; trv=0; tb=0 }

inline read_copies() {
  vm=0;
  if :: ok[0]==1||ok[0]==2 -> vm=vm|1 :: ok[0]!=1 fi;
#if NCOPY>1
  if :: ok[1]==1||ok[1]==2 -> vm=vm|2 :: ok[1]!=1 fi;
#endif
#if NCOPY>2
  if :: ok[2]==1||ok[2]==2 -> vm=vm|4 :: ok[2]!=1 fi;
#endif
#if NCOPY>3
  if :: ok[3]==1||ok[3]==2 -> vm=vm|8 :: ok[3]!=1 fi;
#endif
  nw=9;
  for (i : 0 .. NCOPY-1) { if :: BIT(vm,i) && (nw==9 || gen[i]>gen[nw]) -> nw=i :: else fi };
  for (i : 0 .. NCOPY-1) {
    if
    :: BIT(vm,i) && gen[i]==gen[nw] -> assert(rec[i]==rec[nw])  /* I5 */
    :: else
    fi
  };
  i=0
}
#define SAME(k) (k>=NCOPY || (BIT(vm,k) && gen[k]==gen[nw] && rec[k]==rec[nw]))
#define AGREE   (nw!=9 && SAME(0) && SAME(1) && SAME(2) && SAME(3))

/* w = the copy to be overwritten next */
inline choose() {
  w=9;
  for (i : 0 .. NCOPY-1) {
    if :: R_DAMAGEDFIRST && w==9 && !BIT(dn,i) && !BIT(vm,i) -> w=i :: else fi
  };
  if :: w==9 && !R_NEWESTLAST && nw!=9 && !BIT(dn,nw) -> w=nw :: else fi;
  if
  :: w==9 -> for (i : 0 .. NCOPY-1) {
       if
       :: !BIT(dn,i) && (w==9 || w==nw || (i!=nw && gen[i]<gen[w])) -> w=i
       :: else
       fi }
  :: else
  fi;
  i=0
}

/* VER: slot s holds what the record says; Boot asks for the floor in trials */
#define VER(c,s)     (DIG(c,s)!=0 && slot[s]==DIG(c,s))
#define VERTRIAL(c)  (!R_VERIFYBOOT || (DIG(c,ACT(c))==0 -> LOSTC(c) : \
                      (SEC(DIG(c,ACT(c)))>=FLOOR(c) && VER(c,ACT(c)))))
#define VERCOM(c)    (!R_VERIFYBOOT || DIG(c,ACT(c))==0 || VER(c,ACT(c)))
#define FALL(c)      (R_FALLBACK && VER(c,1-ACT(c)) && SEC(DIG(c,1-ACT(c)))>=FLOOR(c) && \
                      (R_FALLBACK==2 || (APP(c,1-ACT(c)) && !REJ(c,1-ACT(c)))))

inline handover(s) {
  if
  :: lostg ->                                        /* any order, but in turn */
       if :: slot[s]==PART -> bad++ :: else -> bad=0 fi;
       assert(bad<2)                                 /* I16 */
  :: else ->
       assert(slot[s]!=PART || (DIG(cur,s)==0 && rots>0)); /* I1 complete */
       assert(slot[s]!=4);                           /* I1 authentic */
       assert(SEC(slot[s])>=FLOOR(cur));             /* I7 */
       if
       :: COM(cur) ->
            assert(appr[s]);                         /* I10 */
            if
            :: slot[s]==expv
            :: slot[s]!=expv && slot[s]==pendv -> expv=pendv
            :: slot[s]!=expv && slot[s]!=pendv && tr!=NONE && slot[s]==trv -> expv=trv
            :: else -> assert(rots>0); expv=slot[s]  /* I4 */
            fi;
            end_trial()
       :: else ->
            assert(tr==s);                           /* I4, I6 */
            tb++; assert(tb<=NTRY)                   /* I3 */
       fi
  fi;
  SAY("handover to slot %d, state %d\n", s, cur);
  rs=s; mode=1; bp=0; kind[0]=0; pc[0]=0; mg=0
}

init {
  d_step {
    slot[0]=1; appr[0]=1;
    for (i : 0 .. NCOPY-1) { ok[i]=(FIRST->3:1); rec[i]=(FIRST->0:(1<<1)|(NONE<<2)) };
    i=0
  }
#ifdef TRACE
  begin(K_BOOT,0);
#endif
endloop:
  do
  /* ================= the world ================= */
  :: STEP { CUT && (mode!=0 || sp!=0 || bp!=0) ->
#ifdef TRACE
       if :: left>0 -> emit(op,arg,0) :: else fi;
#endif
       if :: mode==0 -> bad=0 :: else fi;              /* progress needs quiet */
       reset() }
  :: STEP { WITH_KILL && CUT && mode!=0 && (kind[0] || kind[1] || cur) ->
#ifdef TRACE
       emit(op,arg,4); begin(K_OPEN,0);
#endif
       /* what the medium has begun it ends */
       if :: sp==3 -> spoil(w) :: else -> if :: sp==5 && ok[w]==2 -> ok[w]=1 :: else fi fi;
       wipe_updater(); mode=1; TELL("killed") }
#ifdef TRACE
#define ATREST (op==0 && mode==2 && left>0 && NSPOILT==0)
#define OFF    ATREST
#else
#define ATREST 1
#define OFF    (mode!=0 || bp==0)
#endif
  :: STEP { 0<NCOPY && flips<FLIPS && ok[0]==1 && ATREST -> spoil(0); flips++; emit(20,0,1) }
  :: STEP { 1<NCOPY && flips<FLIPS && ok[1]==1 && ATREST -> spoil(1); flips++; emit(20,1,1) }
  :: STEP { 2<NCOPY && flips<FLIPS && ok[2]==1 && ATREST -> spoil(2); flips++; emit(20,2,1) }
  :: STEP { 3<NCOPY && flips<FLIPS && ok[3]==1 && ATREST -> spoil(3); flips++; emit(20,3,1) }
  :: STEP { rots<ROT && slot[0]!=PART && OFF -> slot[0]=PART; rots++; emit(21,0,1) }
  :: STEP { rots<ROT && slot[1]!=PART && OFF -> slot[1]=PART; rots++; emit(21,1,1) }
  :: STEP { losses<LOST && sp==0 && mode==2 && ATREST ->
       for (i : 0 .. NCOPY-1) { spoil(i) }; losses++; lostg=1; cm=0; stale=0; emit(22,0,1) }

  /* ================= a store or heal of the record ================= */
  :: STEP { sp==0 && pc[0]>=100 && GO -> sp=1; own=0 }
  :: STEP { sp==0 && pc[1]>=100 && GO -> sp=1; own=1 }
  :: atomic { sp==1 && GO ->
       read_copies();
       d_step {
       dn=0;
       if :: nw!=9 && gen[nw]>mg -> mg=gen[nw] :: else fi;
       if
       :: heal && nw!=9 ->
            cur=rec[nw]; nx[0]=cur;
            wg=gen[nw]+((vm!=ALL && R_HEALGEN)->3:0);
            sp=((AGREE || !R_HEAL)->6:2)
       :: heal && nw==9 ->
            /* nothing readable */
            assert(LOST || FIRST);                    /* I5 */
            if
            :: FIRST && losses==0 && NSPOILT<=R_FIRST ->
                 cur=MAIN(0,(mode==1->rs:0),1,NONE,0,0); fresh=(mode==1)
            :: else ->
                 assert(LOST);                        /* I5 */
                 lostg=1; cm=0; stale=0; end_trial();
                 cur=(mode==1 -> LOSTSTATE(rs,NONE,0,1) : LOSTSTATE(0,1,1,0))
            fi;
            sp=6
       :: !heal ->
            wg=mg+1+((vm!=ALL && R_HEALGEN)->1:0);
            sp=((AGREE && rec[nw]==nx[own])->6:2)
       fi;
       assert(wg<200);                                 /* bound */
       SAY("  read: valid %d, newest %d, to write g%d\n", vm, nw, wg) } }
  :: atomic { sp==2 && GO ->
#if WEAK>0
       if
       :: dn!=0 ->                                    /* what is left is read again */
            if :: BIT(vm,0) && !BIT(dn,0) && ok[0]!=1 -> vm=vm&~1 :: !(BIT(vm,0) && !BIT(dn,0) && ok[0]==0) fi;
            if :: BIT(vm,1) && !BIT(dn,1) && ok[1]!=1 -> vm=vm&~2 :: !(BIT(vm,1) && !BIT(dn,1) && ok[1]==0) fi;
            if :: BIT(vm,2) && !BIT(dn,2) && ok[2]!=1 -> vm=vm&~4 :: !(BIT(vm,2) && !BIT(dn,2) && ok[2]==0) fi;
            if :: BIT(vm,3) && !BIT(dn,3) && ok[3]!=1 -> vm=vm&~8 :: !(BIT(vm,3) && !BIT(dn,3) && ok[3]==0) fi
       :: else
       fi;
#else
       if :: dn!=0 -> for (i : 0 .. NCOPY-1) { if :: ok[i]!=1 && !BIT(dn,i) -> vm=vm&~(1<<i) :: else fi } :: else fi;
#endif
       d_step { choose();
       if
       :: WEAK>0 && (ok[w]==1 || ok[w]==2) -> ok[w]=2; sp=3
       :: else -> spoil(w); sp=(WEAK>0->4:5)
       fi; TELL("  spoil"); HALF } }
#if WEAK>0
  :: STEP { sp==3 && GO -> spoil(w); sp=4; TELL("  erased") }
  :: STEP { sp==4 && GO -> ok[w]=2; gen[w]=wg; rec[w]=nx[own]; sp=5; TELL("  half written") }
#endif
  :: STEP { sp==5 && GO ->
       ok[w]=1; gen[w]=wg; rec[w]=nx[own];
       dn=dn|(1<<w); vm=vm|(1<<w); TELL("  written"); HALF;
       if
       :: !R_ACKLATE && kind[own]==K_COM && !heal -> expv=pendv; end_trial(); cm=0; stale=0
       :: else
       fi;
       if
       :: dn==ALL || !R_MIRROR -> sp=6; dn=0; vm=0; w=0; nw=0; mg=wg; wg=0; normalize()
       :: else -> sp=2; w=0
       fi }

  /* ================= the boot stage, and Open ================= */
  :: STEP { mode<2 && bp==0 && GO && (mode==0 || slot[rs]!=PART) ->   /* junk hangs */
       heal=1; sp=1; bp=1;
#ifdef TRACE
       op=(mode==0->K_BOOT:K_OPEN)
#endif
       }
  :: STEP { mode==0 && bp==1 && sp==6 && GO -> sp=0; heal=0; nx[0]=0; dn=0; vm=0; nw=0; wg=0; bp=2 }
  :: STEP { mode==1 && bp==1 && sp==6 && GO -> sp=0; heal=0; nx[0]=0; dn=0; vm=0; nw=0; wg=0; bp=0;
       if
       :: !R_COUNTFIRST && !COM(cur) && ACT(cur)==rs && !BOOTED(cur) ->
            nx[0]=MAIN(cur,rs,0,REV(cur),TRIES(cur)-1,1); kind[0]=K_SET; lock=1; store(0,30)
       :: else
       fi;
       if
       :: LOSTC(cur) && ACT(cur)!=rs ->                /* the slots take turns */
            nx[0]=LOSTSTATE(rs,ACT(cur),0,1); kind[0]=K_OPEN; store(0,6); bp=6
       :: else -> mode=2; emit(K_OPEN,0,1)
       fi }
  :: STEP { mode==1 && bp==6 && sp==6 && GO -> stored(0); done(0); bp=0; mode=2; emit(K_OPEN,0,1) }
  :: STEP { mode==0 && bp==2 && GO ->                 /* decide */
       if
       :: COM(cur) && VERCOM(cur) -> bp=5
       :: COM(cur) && !VERCOM(cur) && FALL(cur) ->
            nx[0]=SETREJ(SETTLED(cur,1-ACT(cur)),ACT(cur),1); kind[0]=K_BOOT; store(0,3); bp=3
       :: COM(cur) && !VERCOM(cur) && !FALL(cur) ->
            /* only damage to a slot leaves nothing to boot */
            assert(rots>0 && (slot[0]==PART || slot[1]==PART));             /* brick */
            assert(!(APP(cur,1-ACT(cur)) && !REJ(cur,1-ACT(cur)) && VER(cur,1-ACT(cur)) && SEC(slot[1-ACT(cur)])>=FLOOR(cur))); /* brick */
            emit(K_BOOT,0,2); bp=9
       :: !COM(cur) && TRIES(cur)>0 && VERTRIAL(cur) ->
            nx[0]=MAIN(cur,ACT(cur),0,REV(cur),TRIES(cur)-1,1);
            if
            :: R_COUNTFIRST -> kind[0]=K_BOOT; store(0,3); bp=3
            :: else -> nx[0]=0; bp=5
            fi
       :: !COM(cur) && !(TRIES(cur)>0 && VERTRIAL(cur)) ->
            assert(REV(cur)!=NONE);                   /* brick */
            nx[0]=REVERTED(cur,1); if :: cm!=0 && LOSTC(cur) -> stale=1 :: else fi;
            kind[0]=K_BOOT; store(0,4); bp=4
       fi }
  :: STEP { mode==0 && bp==3 && sp==6 && GO -> stored(0); bp=5 }
  :: STEP { mode==0 && bp==4 && sp==6 && GO -> stored(0); bp=2 }
  :: STEP { mode==0 && bp==5 && GO -> handover(ACT(cur)); emit(K_BOOT,0,1);
#ifdef TRACE
       begin(K_OPEN,0)
#endif
       }

  /* ================= Update ================= */
#define KNOWN    (slot[rs]!=PART || DIG(cur,rs)!=0)
#define MAYWRITE (IDLE && FREE_U && KNOWN && (!R_GUARD || (COM(cur) && ACT(cur)==rs)))
/* a lost record has lost the security versions, too */
#define ADMIT(v) (SEC(v)>=FLOOR(cur) && !(LOST && SEC(v)))
  :: STEP { MAYWRITE && GO && ADMIT(1) -> kind[0]=K_UPD; upd=1; t=1-rs; lock=1; pc[0]=1; begin(K_UPD,1) }
  :: STEP { MAYWRITE && GO && ADMIT(2) -> kind[0]=K_UPD; upd=2; t=1-rs; lock=1; pc[0]=1; begin(K_UPD,2) }
  :: STEP { MAYWRITE && GO && ADMIT(3) -> kind[0]=K_UPD; upd=3; t=1-rs; lock=1; pc[0]=1; begin(K_UPD,3) }
#ifdef TRACE
  :: STEP { MAYWRITE && GO && ADMIT(2) && !(DIG(cur,1-rs)==2 && slot[1-rs]==2) -> kind[0]=K_UPD; upd=2; t=1-rs; lock=1; pc[0]=1; begin(K_UPD,12) }
#endif
  :: STEP { MAYWRITE && GO && !R_AUTH -> kind[0]=K_UPD; upd=4; t=1-rs; lock=1; pc[0]=1 }

  /* ================= CreateSnapshot ================= */
  :: STEP { WITH_SNAP && MAYWRITE && GO -> kind[0]=K_SNAP; upd=DIG(MEASURE(cur),rs); t=1-rs; lock=1; pc[0]=1; begin(K_SNAP,0) }
  :: STEP { WITH_SNAP && MAYWRITE && GO -> kind[0]=K_SNAP; upd=DIG(MEASURE(cur),rs); t=1-rs; sar=1; lock=1; pc[0]=1; begin(K_SNAP,1) }

  /* both: forget, erase, write, read back, store */
#define WRITING (kind[0]==K_UPD || kind[0]==K_SNAP)
  :: STEP { WRITING && pc[0]==1 && GO ->
       assert(!COM(cur) || FLOOR(cur)>=SEC(slot[rs]) || DIG(cur,rs)==0 || lostg); /* I7 */
       if
       :: VER(cur,t) && DIG(cur,t)==upd && upd!=PART -> pc[0]=4
       :: else ->
            nx[0]=MEASURE(cur); nx[0]=FORGET(nx[0],t);
            if
            :: R_FORGET && (DIG(cur,t)!=0 || REV(cur)==t || (fresh && R_FORGET==1)) -> store(0,2)
            :: else -> nx[0]=0; pc[0]=2
            fi
       fi }
  :: STEP { WRITING && pc[0]==2+100 && sp==6 && own==0 && GO -> stored(0) }
  :: STEP { WRITING && pc[0]==2 && GO ->
       assert(t!=rs);                                 /* I2 */
       assert(t!=ACT(cur));                           /* I2 */
       assert(COM(cur) || t!=REV(cur));               /* I2 */
       slot[t]=PART; appr[t]=0; pc[0]=3; TELL("erase slot"); HALF }
  :: STEP { WRITING && pc[0]==3 && GO && GOODWRITE -> slot[t]=(kind[0]==K_UPD || slot[rs]==upd -> upd : PART); pc[0]=4; HALF }
  :: STEP { WRITING && pc[0]==3 && GO && BADWRITE -> pc[0]=4; HALF }    /* written, but not that */
  :: STEP { WRITING && pc[0]==4 && GO ->
       if
       :: R_VERIFYFIRST && (slot[t]!=upd || upd==PART) -> emit(kind[0],ARG,2); done(0)
       :: else ->
            nx[0]=MEASURE(cur);
            if
            :: kind[0]==K_UPD -> nx[0]=SETSLOT(nx[0],t,upd,0,0); start_trial(t,rs,0)
            :: else ->
                 nx[0]=SETSLOT(nx[0],t,DIG(nx[0],rs),APP(nx[0],rs),REJ(nx[0],rs)); appr[t]=appr[rs];
                 if :: sar -> start_trial(rs,t,0) :: else fi
            fi;
            store(0,30)
       fi }

  /* ================= SetBootState ================= */
#define MAYSET   (WITH_SET && IDLE && FREE_U && KNOWN && R_SETGUARD && COM(cur) && ACT(cur)==rs)
#define GOODREV  (APP(cur,1-rs) && !REJ(cur,1-rs))
#define BOOTABLE (VER(cur,1-rs) && SEC(DIG(cur,1-rs))>=FLOOR(cur))
  :: STEP { MAYSET && GO && BOOTABLE ->               /* try the other slot */
       begin(K_SET,0); kind[0]=K_SET; lock=1; nx[0]=MEASURE(cur); start_trial(1-rs,rs,0); store(0,30) }
  :: STEP { MAYSET && GO && BOOTABLE && (!R_REVAPPR || GOODREV) -> /* doubt this one */
       begin(K_SET,1); kind[0]=K_SET; lock=1; nx[0]=MEASURE(cur); start_trial(rs,1-rs,0); store(0,30) }
  :: STEP { MAYSET && GO && BOOTABLE && (!R_REVAPPR || GOODREV) && REV(cur)==NONE ->
       begin(K_SET,2); kind[0]=K_SET; lock=1; nx[0]=MEASURE(cur); nx[0]=PUT(nx[0],2,3,1-rs); store(0,30) }
  :: STEP { MAYSET && GO && REV(cur)!=NONE ->
       begin(K_SET,3); kind[0]=K_SET; lock=1; nx[0]=MEASURE(cur); nx[0]=PUT(nx[0],2,3,NONE); store(0,30) }
  :: atomic { WITH_SET && IDLE && FREE_U && !R_SETGUARD ->
       kind[0]=K_SET; lock=1; nx[0]=MEASURE(cur);
       if
       :: nx[0]=MAIN(nx[0],1-rs,1,NONE,0,0); expv=slot[1-rs]; end_trial()
       :: start_trial(1-rs,rs,0)
       fi;
       store(0,30) }

  :: STEP { (WRITING || kind[0]==K_SET) && pc[0]==30+100 && sp==6 && own==0 && GO ->
       emit(kind[0],ARG,1); stored(0); done(0) }

  /* ================= Commit ================= */
  /* somebody checks the running firmware and sends Commit, which may be late */
  :: STEP { mode==2 && cm==0 && lock==0 && kind[0]==0 && kind[1]==0 && !COM(cur) && ACT(cur)==rs && slot[rs]!=PART && (tr==rs || lostg) && GO ->
       cm=slot[rs]; stale=0; appr[rs]=1 }
  :: STEP { IDLE && cm!=0 && FREE_C && GO && !COM(cur) && (!R_RUNNING || ACT(cur)==rs) &&
            (R_TAG==0 || (R_TAG==1 && cm==slot[ACT(cur)]) || (R_TAG==2 && !stale)) ->
       begin(K_COM,0); kind[0]=K_COM; lock=1; pendv=slot[ACT(cur)];
       nx[0]=COMMITTED(cur);
       if
       :: R_FLOOR==0 && SEC(DIG(cur,ACT(cur)))>FLOOR(cur) -> nx[0]=PUT(cur,17,1,1); store(0,20)
       :: else -> store(0,30)
       fi }
  :: STEP { IDLE && cm!=0 && FREE_C && GO && (COM(cur) || ACT(cur)!=rs || stale) ->  /* refused */
       cm=0;
#ifdef TRACE
       if :: stale -> emit(K_COM,1,3) :: else fi;
#endif
       stale=0 }
#ifndef TRACE
  :: STEP { cm!=0 && kind[0]==0 -> cm=0; stale=0 }                         /* lost on its way */
#endif
  :: STEP { kind[0]==K_COM && pc[0]==20+100 && sp==6 && own==0 && GO -> stored(0); nx[0]=COMMITTED(cur); store(0,30) }
  :: STEP { kind[0]==K_COM && pc[0]==30+100 && sp==6 && own==0 && GO ->     /* answered */
       stored(0); if :: pendv!=0 -> expv=pendv; end_trial(); lostg=0; bad=0 :: else fi; cm=0; stale=0;
       if
       :: R_FLOOR==2 && SEC(DIG(cur,rs))>FLOOR(cur) -> nx[0]=PUT(cur,17,1,1); store(0,31)
       :: else -> emit(K_COM,0,1); done(0)
       fi }
  :: STEP { kind[0]==K_COM && pc[0]==31+100 && sp==6 && own==0 -> stored(0); done(0) }

  /* ================= Revert, and the commit timeout ================= */
  :: STEP { IDLE && FREE_C && GO && !COM(cur) && REV(cur)!=NONE ->
       begin(K_REV,0); kind[0]=K_REV; lock=1;
       nx[0]=(R_CALLOFF && UNBEGUN(cur) -> SETTLED(cur,rs) : REVERTED(cur,ACT(cur)==rs)); if :: cm!=0 && LOSTC(cur) -> stale=1 :: else fi; store(0,30) }
  :: STEP { kind[0]==K_REV && pc[0]==30+100 && sp==6 && own==0 && GO ->
       emit(K_REV,0,1); stored(0); revert_answered(); done(0) }
  :: STEP { mode==2 && kind[1]==0 && FREE_C && (R_LOCK!=1 || kind[0]==0) && GO &&
            !COM(cur) && BOOTED(cur) && ACT(cur)==rs && REV(cur)!=NONE ->
       begin(K_TMO,0); kind[1]=K_TMO; if :: R_LOCK==1 -> lock=2 :: else fi;
       nx[1]=REVERTED(cur,1); if :: cm!=0 && LOSTC(cur) -> stale=1 :: else fi; store(1,30) }
  :: STEP { kind[1]==K_TMO && pc[1]==30+100 && sp==6 && own==1 && GO ->
       stored(1); revert_answered();
       emit(K_TMO,0,1); reset() }

#ifdef TRACE
  /* ================= what people do most: reboot into the update ================= */
#define PENDING (IDLE && op==0 && left>0 && ACT(cur)!=rs)
  :: STEP { PENDING -> emit(0,0,0); reset() }
  :: STEP { PENDING -> emit(0,0,0); reset() }
  :: STEP { PENDING -> emit(0,0,0); reset() }
  /* ================= calls that must be refused ================= */
  :: STEP { IDLE && op==0 && GO ->
       if
       :: !(COM(cur) && ACT(cur)==rs) -> emit(K_UPD,2,3)
       :: !(COM(cur) && ACT(cur)==rs) -> emit(K_SNAP,1,3)
       :: !(COM(cur) && ACT(cur)==rs && BOOTABLE) -> emit(K_SET,0,3)
       :: COM(cur) && ACT(cur)==rs && !GOODREV -> emit(K_SET,1,3)
       :: COM(cur) && ACT(cur)==rs && !GOODREV -> emit(K_SET,2,3)
       :: COM(cur) && ACT(cur)==rs && FLOOR(cur)==1 -> emit(K_UPD,3,3)
       :: COM(cur) || ACT(cur)!=rs -> emit(K_COM,0,3)
       :: COM(cur) -> emit(K_REV,0,3)
       fi }
#endif
  od
}
