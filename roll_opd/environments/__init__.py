"""Environments: one file an environment, a class with Gymnasium's interface whose observations and actions are text.

How to add an environment
-------------------------

1. Write a class, here or in a module of your own anywhere on the import path::

       class HigherLower(gymnasium.Env[str, str]):
           def __init__(self, highest: int = 9) -> None:
               self._highest = highest
               self._parser = ActionParser(r"<answer>(\\d+)</answer>")

           def reset(self, *, seed=None, options=None):
               super().reset(seed=seed)
               self._number = int(self.np_random.integers(1, self._highest + 1))
               return "Guess my number.", {"env_instruction": f"It lies between 1 and {self._highest}."}

           def step(self, action):
               guess = self._parser.parse(action).action
               success = guess is not None and int(guess) == self._number
               metrics = {"success": success, "action_is_valid": guess is not None}
               if success or guess is None:
                   return "Right!" if success else "No answer.", float(success), success, False, {"metrics": metrics}
               hint = "Higher." if int(guess) < self._number else "Lower."
               return hint, 0.0, False, False, {"metrics": metrics}

   :mod:`~roll_opd.environments.base` says what ``info`` may hold. The whole text of a turn is handed to ``step``;
   :class:`~roll_opd.environments.action.ActionParser` finds the move in it. For a game on a grid there is
   :class:`~roll_opd.environments.grid_game.GridGame`.

2. Take all chance from ``self.np_random`` (after ``super().reset(seed=seed)``): the members of a group play the same
   episode, and one that was lost with its process is played again, so the seed alone must decide it.

3. Refuse arguments that cannot work with a ``ValueError`` that names them; it is shown under the environment's
   ``env_config``. Errors of ``reset`` and ``step`` cost the episode, which is played again, never the run. So does an
   environment that hangs. An environment that executes what a model wrote needs more than a process of its own: see
   :mod:`~roll_opd.environments.sandbox`.

4. Name the class in the YAML: ``custom_envs: {MyTag: {env_type: my_package.my_module.HigherLower, env_config: {highest:
   20}}}``. ``PYTHONPATH=.`` in front of the command makes a module of the current folder known, in every process. One
   that ships with this package also gets a short name in :mod:`~roll_opd.environments.registry`.

5. Test it with an episode worked out by hand, equal seeds, a policy that always wins and one that plays at random.
"""
